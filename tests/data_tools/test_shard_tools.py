"""Merge, split, verify, show, blend. Oracles: Megatron-Core's reader, the arrays that were written, and damage done on
purpose."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_tools import shard_streams
from data_tools.__main__ import main
from data_tools.merge import merge
from data_tools.shard_writer import write_shard
from data_tools.source_record import TokenizeSettings
from data_tools.split import split
from data_tools.tokenize_corpus import tokenize
from nemotron_train.config.load import load_config
from nemotron_train.data.ledger import ConsumptionLedger
from nemotron_train.data.run_data import open_run_data
from nemotron_train.data.shard_format import HEADER_BYTES, bin_path, idx_path, read_array
from nemotron_train.data.shard_meta import read_meta
from nemotron_train.errors import ConfigError, DataError
from tests.data_tools.text import texts, write_jsonl

SHARDS = 3
SUFFIXES = (".bin", ".idx", ".meta.json")


@pytest.fixture
def source(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A tokenized source of three shards."""
    folder = tmp_path / "data"
    settings = TokenizeSettings("web", tokenizer_path, num_shards=SHARDS)
    tokenize([write_jsonl(tmp_path / "web.jsonl", texts(200))], folder, settings, 1)
    return folder


def documents_by_megatron(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(str(prefix))
    bounds = data.document_indices
    return [
        np.concatenate([data[n] for n in range(start, end)] or [np.zeros(0)]).tolist()
        for start, end in pairwise(bounds)
    ]


def test_merged_shards_are_read_by_megatron_as_their_documents(source: Path, tmp_path: Path) -> None:
    """Fails if pointers or document bounds of later shards are not moved, or a fact of the meta file is wrong."""
    prefixes = [source / f"web_{number:05d}" for number in range(SHARDS)]
    meta = merge(prefixes, tmp_path / "out" / "all")
    expected = [document for prefix in prefixes for document in documents_by_megatron(prefix)]
    assert documents_by_megatron(tmp_path / "out" / "all") == expected
    assert (meta.documents, meta.tokens) == (len(expected), sum(map(len, expected)))
    assert (meta.eod_id, meta.eod_terminated) == (0, True)
    assert main(["verify", str(tmp_path / "out" / "all")]) == 0


def test_documents_of_several_sequences_stay_together(tmp_path: Path) -> None:
    """Fails if sequences are taken for documents: Megatron's tools write several to a document."""
    import torch

    for number in range(2):
        builder = IndexedDatasetBuilder(str(tmp_path / f"s{number}.bin"), dtype=np.int32)
        for document in range(5):
            for sequence in range(1 + document % 3):
                first = 100 * number + 10 * document
                builder.add_item(torch.arange(first, first + 3 + sequence))
            builder.end_document()
        builder.finalize(str(tmp_path / f"s{number}.idx"))
    merge([tmp_path / "s0", tmp_path / "s1"], tmp_path / "both")
    expected = documents_by_megatron(tmp_path / "s0") + documents_by_megatron(tmp_path / "s1")
    assert documents_by_megatron(tmp_path / "both") == expected
    made = split(tmp_path / "both", tmp_path / "cut", shards=4)
    assert [document for prefix in made for document in documents_by_megatron(prefix)] == expected


@pytest.mark.parametrize("size", [{"shards": 1}, {"shards": 4}, {"shard_tokens": 500}])
def test_split_and_merged_again_is_the_same(source: Path, tmp_path: Path, size: dict[str, int]) -> None:
    """Fails if a cut loses, doubles or moves a document, or shards are of very different sizes."""
    whole = source / "web_00001"
    made = split(whole, tmp_path / "cut" / "part", **size)
    tokens = [meta.tokens for meta in map(read_meta, made) if meta is not None]
    longest = max(map(len, documents_by_megatron(whole)))
    assert max(tokens) - min(tokens[:-1] or tokens) <= 2 * longest
    assert len(made) == size.get("shards", len(made))
    merge(made, tmp_path / "again")
    for path in (bin_path, idx_path):
        assert path(tmp_path / "again").read_bytes() == path(whole).read_bytes()


def test_what_cannot_be_merged_or_split_is_refused(source: Path, tmp_path: Path) -> None:
    """Fails if shards of two dtypes are mixed, existing files overwritten, or documents cut."""
    wide = tmp_path / "wide"
    builder = IndexedDatasetBuilder(str(wide) + ".bin", dtype=np.int32)
    builder.add_document(np.arange(5, dtype=np.int32), [5])
    builder.finalize(str(wide) + ".idx")
    with pytest.raises(DataError, match=r"uint16 in .*web_00000\.idx, int32 in .*wide\.idx"):
        merge([source / "web_00000", wide], tmp_path / "mixed")
    with pytest.raises(DataError, match=r"web_00001\.bin exists and is not overwritten"):
        merge([source / "web_00000"], source / "web_00001")
    with pytest.raises(ConfigError, match=r"gives 1 shards of whole documents, not 2"):
        split(wide, tmp_path / "cut", shards=2)
    modes = tmp_path / "modes"
    bin_path(modes).write_bytes(bin_path(wide).read_bytes())
    idx_path(modes).write_bytes(idx_path(wide).read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"modes\.idx has modes of sequences"):
        merge([modes], tmp_path / "x")


def flip(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(bytes(content))


def rewrite(path: Path, **facts: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


BIN, IDX, META, MANIFEST = "web_00001.bin", "web_00001.idx", "web_00001.meta.json", "web.manifest.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a bit of a token": (lambda f: flip(f / BIN, 200, b"\x05"), [f"{BIN}: bytes 0 to", "damaged or replaced"]),
    "a token beyond the vocabulary": (
        lambda f: flip(f / BIN, 200, (60_000).to_bytes(2, "little")),
        [f"{BIN}: token 60000 at byte 200 is not one of 0"],
    ),
    "an end within a document": (
        lambda f: flip(f / BIN, 200, bytes(2)),
        [f"{BIN}: documents should end with token 0, and only they; not so at byte 200"],
    ),
    "the tokens cut": (lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:-2]), [f"{BIN}: ", "describes"]),
    "a length": (
        lambda f: flip(f / IDX, HEADER_BYTES, (5000).to_bytes(4, "little")),
        [f"{IDX}: sequence 1 points to byte"],
    ),
    "a negative length": (
        lambda f: flip(f / IDX, HEADER_BYTES + 8, (-1).to_bytes(4, "little", signed=True)),
        [f"{IDX}: sequence 2 has length -1"],
    ),
    "the dtype": (lambda f: flip(f / IDX, 17, b"\x03"), ["dtype is int16"]),
    "a shard gone": (lambda f: [(f / name).unlink() for name in (BIN, IDX)], [f"{IDX} is missing"]),
    "a shard too many": (
        lambda f: [(f / f"web_00009{s}").write_bytes((f / f"web_00000{s}").read_bytes()) for s in SUFFIXES],
        ["web_00009.idx is not in web.manifest.json"],
    ),
    "another shard in its place": (
        lambda f: [(f / f"web_00001{s}").write_bytes((f / f"web_00002{s}").read_bytes()) for s in SUFFIXES],
        ["web_00001: tokens is", "the shard was replaced"],
    ),
    "a fact": (lambda f: rewrite(f / META, tokens="x"), [f"{META}: tokens is 'x', which cannot be"]),
    "a fact of all shards": (lambda f: rewrite(f / MANIFEST, dtype="foo"), [f"{MANIFEST}: dtype is foo, not one of"]),
    "the facts": (lambda f: (f / META).write_bytes((f / META).read_bytes()[:-5]), [f"{META} is damaged"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_finds_the_damage_and_says_where(source: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a kind of damage passes, or the report lacks file and place."""
    assert main(["verify", str(source), "--workers", "1"]) == 0
    damage, wanted = DAMAGE[case]
    damage(source)
    assert main(["verify", str(source), "--workers", "1"]) == 1
    printed = capsys.readouterr().err
    assert [part for part in wanted if part not in printed] == []
    assert "problems in" in printed


def test_verify_reports_all_problems_and_another_tokenizer(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the first problem hides the others, or the tokenizer is not compared."""
    flip(source / BIN, 200, b"\x05")
    flip(source / "web_00002.idx", HEADER_BYTES, (5000).to_bytes(4, "little"))
    (tmp_path / "other.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 70_000}}}))
    assert main(["verify", str(source), "--tokenizer", str(tmp_path / "other.json"), "--workers", "2"]) == 1
    printed = capsys.readouterr().err
    assert "web_00001.bin: bytes" in printed
    assert "web_00002.idx: sequence 1" in printed
    assert printed.count("(--tokenizer)") == SHARDS


def test_verify_goes_on_after_the_first_problem_of_a_shard(
    source: Path, tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a damaged index or meta file hides damaged tokens, the same problem is told twice, or the manifest of a
    folder below is not believed."""
    flip(source / BIN, 200, b"\x05")
    flip(source / IDX, HEADER_BYTES, (5000).to_bytes(4, "little"))
    (source / "web_00002.meta.json").write_bytes(b"{")
    flip(source / "web_00002.bin", 300, b"\x05")
    for suffix in SUFFIXES:
        (source / f"web_00000{suffix}").unlink()
    assert main(["verify", str(tmp_path), "--workers", "1", "--tokenizer", str(tokenizer_path.parent)]) == 1
    printed = capsys.readouterr().err
    for wanted in (
        f"{IDX}: sequence 1 points",
        f"{BIN}: bytes 0 to",
        "web_00002.meta.json is damaged",
        "web_00000.idx is",
    ):
        assert printed.count(wanted) == 1
    assert "web_00002.bin: bytes 0 to" in printed
    assert "its manifest says" in printed
    (source / "web.manifest.json").write_bytes(b"{")
    assert main(["verify", str(source), "--workers", "1"]) == 1
    printed = capsys.readouterr().err
    assert "web.manifest.json is damaged" in printed
    assert f"{BIN}: bytes 0 to" in printed


def test_split_looks_up_where_to_cut_and_reads_no_whole_index(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if memory grows with the number of documents: shards of billions of them would not be cut."""
    largest = []

    def read(path: Path, offset: int, dtype: str, count: int) -> np.ndarray:
        largest.append(count)
        return read_array(path, offset, dtype, count)

    monkeypatch.setattr(shard_streams, "read_array", read)
    monkeypatch.setattr(shard_streams, "BLOCK_ENTRIES", 7)
    made = split(source / "web_00001", tmp_path / "part", shard_tokens=500)
    assert len(made) > 3
    assert max(largest) <= 7
    for size in ({"shards": 0}, {"shard_tokens": 0}, {"shard_tokens": -5}):
        with pytest.raises(ConfigError, match="one of them must be given, at least 1"):
            split(source / "web_00001", tmp_path / "none", **size)
    write_shard(tmp_path / "empty", [], np.dtype("<u2"))
    with pytest.raises(ConfigError, match="gives 0 shards of whole documents"):
        split(tmp_path / "empty", tmp_path / "none", shard_tokens=500)


def test_show_decodes_documents_and_says_where_they_lie(
    source: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if another document is shown, or its place is off."""
    shard = source / "web_00000"
    wanted = documents_by_megatron(shard)
    arguments = ["show", "--shard", str(shard), "--tokenizer", str(tokenizer_path)]
    assert main([*arguments, "--document", "4"]) == 0
    printed = capsys.readouterr().out
    start = sum(map(len, wanted[:4]))
    assert f"document 4, tokens {start} to {start + len(wanted[4])}, bytes {2 * start}" in printed
    assert main([*arguments, "--document", str(len(wanted))]) == 1
    assert f"has documents 0 to {len(wanted) - 1}" in capsys.readouterr().err


@pytest.fixture
def experiment(source: Path, tokenizer_path: Path) -> list[str]:
    (source / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    return [
        "experiment=own_text",
        f"data.path={source}",
        "data.sources=[{name: web, prefixes: ['web_*']}]",
        "data.phases=[{start_tokens: 0, weights: [{source: web, weight: 1}]},"
        "{start_tokens: 512, seq_length: 64, weights: [{source: web, weight: 1}]}]",
        "train.seq_length=32",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "train.train_tokens=2048",
        "train.eval_every_steps=0",
        "lr.warmup_tokens=0",
        "lr.decay_tokens=1000",
    ]


def test_show_tells_what_a_step_reads(experiment: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the windows of a step are others than those training takes, before or after a change of length."""
    assert main(["show", "--step", "5", *experiment]) == 0
    step = capsys.readouterr().out
    assert "step 5, tokens 512 to 768 of the plan: windows 16 to 19" in step
    assert step.count("phase 1, epoch 0") == 4
    assert main(["show", "--window", "17", *experiment]) == 0
    assert capsys.readouterr().out in step
    assert main(["show", "--window", "-1", *experiment]) == 1
    assert "numbered from 0, not -1" in capsys.readouterr().err
    assert main(["show", "--step", "99", *experiment]) == 1
    assert "The run has steps 1 to 10" in capsys.readouterr().err


def test_show_believes_the_ledger_of_the_run(
    experiment: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a step is looked up in the plan although the run took it with another batch size, or a ledger of other
    data is believed."""
    run = [*experiment, f"run.dir={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    blend = open_run_data(load_config(run)).blend
    ledger = ConsumptionLedger(tmp_path / "run", blend)
    ledger.write(2, 128, 256)
    ledger.write(2, 128, 192)  # taken again with half the batch after going back to a checkpoint
    assert main(["show", "--step", "2", *run]) == 0
    assert "consumption.jsonl says: windows 4 to 5" in " ".join(capsys.readouterr().out.split())
    assert main(["show", "--step", "2", *run, "run.seed=5"]) == 1
    assert "step 2 read other samples" in capsys.readouterr().err


def test_blend_counts_tokens_and_epochs(
    experiment: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if epochs are not tokens read over tokens there are, or too many pass without a warning."""
    tokens = sum(meta.tokens for n in range(SHARDS) if (meta := read_meta(source / f"web_{n:05d}")) is not None)
    arguments = [*experiment, "data.max_epochs=0.01"]
    assert main(["blend", "--json", "--png", str(tmp_path / "blend.picture"), *arguments]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["sources"]["web"]["tokens"] == tokens
    assert report["sources"]["web"]["epochs"] == pytest.approx(2048 / tokens)
    assert [phase["epochs"]["web"] for phase in report["phases"]] == pytest.approx([512 / tokens, 1536 / tokens])
    assert "more than data.max_epochs=0.01" in printed.err
    assert (tmp_path / "blend.picture").read_bytes().startswith(b"\x89PNG")
