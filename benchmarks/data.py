"""How fast does the data path start and read, and do its promises hold at full size? Megatron-Core's beside it.

    python -m benchmarks.data OUT [--samples N]

Writes its own shards under OUT. Every line names what is measured, the figure, and the bar where there is one.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from data_tools.shard_writer import write_shard
from nemotron_train.data.blend import BlendPlan, Phase
from nemotron_train.data.interleave import Interleave
from nemotron_train.data.loader import SampleReader
from nemotron_train.data.permutation import Permutation
from nemotron_train.data.shard import OpenFiles, Shard
from nemotron_train.data.shard_format import bin_path, idx_path, write_index
from nemotron_train.data.shard_meta import (
    PROBE_BYTES,
    ManifestShard,
    SourceManifest,
    manifest_bytes,
    manifest_path,
    probe_hash,
)
from nemotron_train.data.source import Source

SEQ = 8192
VOCAB = 131_072
EOD = 2
SOURCES, SHARDS, SHARD_TOKENS = 60, 10_000, 2_000_000_000  # 20T tokens
TRAIN_TOKENS = SHARDS * SHARD_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the stream hash")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str, str]] = []

    def report(what: str, figure: str, bar: str) -> None:
        rows.append((what, figure, bar))
        print(f"{what}: {figure} (bar: {bar})", flush=True)

    first_batch(arguments.out / "huge", report)
    reading(arguments.out / "real", report)
    mixture(report)
    shuffling(report)
    growing(report)
    stream_hash(arguments.samples, report)
    table = Table("what", "figure", "bar")
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)


Report = Callable[[str, str, str], None]


def first_batch(folder: Path, report: Report) -> None:
    """Start a fresh process on 10,000 shards whose tokens are holes in sparse files."""
    fake_corpus(folder)
    began = time.time()
    child = [sys.executable, "-m", "benchmarks.data_start", str(folder)]
    result = subprocess.run(child, capture_output=True, text=True, env={**os.environ, "BEGAN": str(began)}, check=True)
    facts = json.loads(result.stdout.splitlines()[-1])
    report(
        f"first batch of {TRAIN_TOKENS / 1e12:.0f}T tokens, {SOURCES} sources, {SHARDS:,} shards, 3 phases",
        f"{facts['seconds']:.2f} s without importing torch ({facts['torch_seconds']:.2f} s), no index file",
        "1 s",
    )
    report("memory of the loader after 2,000 samples of it", f"{facts['memory_mib']:.0f} MiB", "100 MB")


def fake_corpus(folder: Path) -> None:
    """Write real indices and manifests for shards that are all zeros."""
    if (folder / "done").exists():
        return
    zeros = probe_hash(bytes(PROBE_BYTES), bytes(PROBE_BYTES))
    dtype = np.dtype("<i4")
    (folder / "tokenizer.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<|endoftext|>": EOD}}}))
    for number in range(SOURCES):
        name, shards = f"s{number:02d}", []
        place = folder / name
        place.mkdir(exist_ok=True)
        for shard in range(number, SHARDS, SOURCES):
            prefix = place / f"{name}_{shard:05d}"
            with bin_path(prefix).open("wb") as file:
                file.truncate(SHARD_TOKENS * dtype.itemsize)
            with idx_path(prefix).open("wb") as file:
                write_index(file, dtype, [SHARD_TOKENS])
            index = idx_path(prefix).read_bytes()
            digest = xxhash.xxh3_128(index).hexdigest()
            size = SHARD_TOKENS * dtype.itemsize
            shards.append(ManifestShard(prefix.name, SHARD_TOKENS, 1, size, len(index), prefix.name, digest, zeros))
        manifest = SourceManifest(name, dtype.name, 0, EOD, False, None, "benchmark", tuple(shards), {})
        manifest_path(place, name).write_bytes(manifest_bytes(manifest))
    (folder / "done").touch()


def reading(folder: Path, report: Report) -> None:
    """Read real tokens: 8 sources, documents of about 600 tokens, int32."""
    prefixes = write_corpus(folder)
    files = OpenFiles()
    sources = [Source(prefix.name, [Shard(prefix, files)], VOCAB) for prefix in prefixes]
    tokens = {source.name: source.num_tokens for source in sources}
    weights = dict.fromkeys(tokens, 1.0)
    reader = SampleReader(BlendPlan([Phase(0, SEQ, weights)], tokens, seed=1), sources)
    count = sum(tokens.values()) // SEQ
    for boundaries, what in ((True, "with document boundaries"), (False, "tokens only")):
        ours = best_of(3, lambda: read_all(reader, count, boundaries)) * SEQ / 1e6  # noqa: B023  called at once
        theirs = megatron_reading(folder, prefixes, count, boundaries) * SEQ / 1e6
        report(f"warm reading at 8k, one process, {what}", f"{ours:.0f} Mtok/s", "150 Mtok/s")
        against = f"{theirs:.0f} Mtok/s; ours {ours / theirs:.1f}x"
        report(f"the same through GPTDataset and BlendedDataset, {what}", against, "4x")
    cold_reading(prefixes, reader, report)


def write_corpus(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = [folder / f"part{number}" for number in range(8)]
    rng = np.random.default_rng(0)
    for prefix in prefixes:
        if idx_path(prefix).exists():
            continue
        lengths = rng.integers(100, 1100, size=10_000)
        documents = [rng.integers(3, VOCAB, size=length, dtype=np.int32) for length in lengths]
        for document in documents:
            document[-1] = EOD
        write_shard(prefix, documents, np.dtype("<i4"))
    return prefixes


def read_all(reader: SampleReader, count: int, boundaries: bool) -> float:
    """Return samples a second: tokens and the ends of their documents."""
    began = time.perf_counter()
    for sample in range(count):
        _, tokens = reader.read(sample)
        if boundaries:
            np.flatnonzero(tokens == EOD)
    return count / (time.perf_counter() - began)


def megatron_reading(folder: Path, prefixes: list[Path], count: int, boundaries: bool) -> float:
    """Return samples a second of Megatron-Core's data sets, without attention masks: the fastest they have.

    Args:
        boundaries: positions start anew in every document, which is how these data sets tell documents apart.
    """
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        """What the data sets ask of one, where ids are made without text."""

        eod, pad, vocab_size, unique_identifiers = EOD, 0, VOCAB, {"class": "none"}

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ,
        blend=([str(prefix) for prefix in prefixes], [1.0] * len(prefixes)),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=boundaries,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [count, 0, 0], lambda: True, config).build()[0]

    def run() -> float:
        began = time.perf_counter()
        for sample in range(count):
            dataset[sample]
        return count / (time.perf_counter() - began)

    speed = best_of(3, run)
    dist.destroy_process_group()
    return speed


def best_of(times: int, run: Callable[[], float]) -> float:
    return max(run() for _ in range(times))


def cold_reading(prefixes: list[Path], reader: SampleReader, report: Report) -> None:
    """Count what the kernel fetches from disk for samples that are in no cache."""
    for prefix in prefixes:
        descriptor = os.open(bin_path(prefix), os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    count, calls = 400, [0]
    files = reader.sources[0].shards[0]._files
    original = files.read

    def counted(path: Path, offset: int, size: int) -> bytes:
        calls[0] += 1
        return original(path, offset, size)

    files.read = counted
    before = disk_bytes()
    for sample in range(count):
        reader.read(sample)
    fetched = (disk_bytes() - before) / (count * (SEQ + 1) * 4)
    files.read = original
    report("cold reading", f"{calls[0] / count:.2f} reads, {fetched:.2f}x the useful bytes a sample", "1.1, 1.2x")


def disk_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("no read_bytes in /proc/self/io")


def mixture(report: Report) -> None:
    """Take every prefix of 200,000 samples of 1,000 sources."""
    rng = random.Random(1)
    weights = {f"s{number}": rng.random() ** 3 + 1e-4 for number in range(1000)}
    total = sum(weights.values())
    share = np.array([weight / total for weight in weights.values()])
    names = {name: number for number, name in enumerate(weights)}
    tree, drawn, worst = Interleave(weights), np.zeros(len(weights)), 0.0
    for sample in range(200_000):
        drawn[names[tree.draw(sample)[0]]] += 1
        worst = max(worst, float(np.abs(drawn - share * (sample + 1)).max()))
    report("mixture deviation at every prefix, 1,000 sources, 200,000 samples", f"{worst:.2f} samples", "5 samples")


def shuffling(report: Report) -> None:
    """Low-bit flips between neighbours, and how evenly pairs of neighbours fall."""
    cells, keys = 64, 16
    freedom = (cells - 1) ** 2  # in a permutation every cell is left, and entered, as often as any other
    for size in (1 << 20, 1_000_003):
        flips, scores = [], []
        for key in range(keys):
            image = Permutation(size, key).image(np.arange(size))
            flips.append(float(np.mean((image[1:] ^ image[:-1]) & 1)))
            pairs = (image[:-1] * cells // size) * cells + image[1:] * cells // size
            expected = (size - 1) / cells**2
            chi = float(((np.bincount(pairs, minlength=cells**2) - expected) ** 2 / expected).sum())
            scores.append((chi - freedom) / (2 * freedom) ** 0.5)
        report(
            f"permutation of {size:,}, {keys} keys",
            f"low bit flips {min(flips):.2%} to {max(flips):.2%}, pair chi-square z {min(scores):+.1f} to "
            f"{max(scores):+.1f}, mean {np.mean(scores):+.1f}",
            "50 %, |z| < 3",
        )


def plan(train_tokens: int) -> BlendPlan:
    """Three phases over 8 sources of odd sizes; the last one is as long as the run."""
    sources = {f"s{number}": 40_000_003 + 7_777_777 * number for number in range(8)}
    weights = [{name: float(1 + (number * step) % 5) for number, name in enumerate(sources)} for step in (1, 2, 3)]
    starts = (0, train_tokens // 2 // 1024 * 1024, train_tokens * 9 // 10 // 1024 * 1024)
    return BlendPlan([Phase(s, 1024, w) for s, w in zip(starts, weights, strict=True)], sources, seed=3)


def growing(report: Report) -> None:
    """A run whose last phase grows over several epochs."""
    sources = {"a": 3_000_017, "b": 1_000_003}
    phases = [Phase(0, 512, {"a": 1.0, "b": 1.0})]
    short, grown = BlendPlan(phases, sources, 1), BlendPlan([*phases, Phase(9_000_000, 1024, {"b": 1.0})], sources, 1)
    end = 9_000_000 // 512
    same = sum(short.locate(sample) == grown.locate(sample) for sample in range(end))
    report("growing the run over epoch boundaries", f"{same / end:.0%} of {end:,} samples unchanged", "100 %")


def stream_hash(samples: int, report: Report) -> None:
    """Hash where every sample lies, in order, under many layouts with stops."""
    digests = set()
    for ranks in (1, 2, 3, 8):
        for batch in (64, 192, 736):
            digests.add(xxhash.xxh3_128(b"".join(stream(samples, ranks, batch))).hexdigest())
    report(
        f"stream hash over {samples:,} samples, DP 1, 2, 3, 8 x batch 64, 192, 736 x 5 stops",
        f"{len(digests)} different",
        "1",
    )


def stream(samples: int, ranks: int, batch: int) -> Iterator[bytes]:
    """Yield the places of the samples of a run that stops 5 times and goes on from its consumed tokens alone, with
    another plan object, batch and number of ranks every time."""
    dice = random.Random(ranks * 1000 + batch)
    stops = [*sorted(dice.sample(range(1, samples), 5)), samples]
    total, consumed = samples * 1024, 0
    for number, stop in enumerate(stops):
        blend = plan(total)
        sample = blend.sample_at(consumed)
        while sample < min(stop, samples):
            size = min(batch, samples - sample)
            for rank in range(ranks):  # contiguous blocks, as even as they can be
                for g in range(sample + rank * size // ranks, sample + (rank + 1) * size // ranks):
                    place = blend.locate(g)
                    yield np.array(
                        [place.source, place.epoch, *(v for s in place.spans for v in (s.start, s.count))]
                    ).tobytes()
            sample += size
        consumed = blend.tokens_before(sample)
        ranks, batch = (1, 2, 3, 8)[number % 4], (64, 192, 736)[number % 3]


if __name__ == "__main__":
    main()
