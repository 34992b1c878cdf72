"""Damage is never silent: what can happen to the files of a source is refused at the start, naming file and place, or,
in runs of very many shards, before the step that would use it."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_tools.shard_writer import write_shard
from nemotron_train.config.schema import DataSection, DocumentBoundary, PhaseConfig, SourceConfig, SourceWeight
from nemotron_train.data import open_sources
from nemotron_train.data.batch import RankShare
from nemotron_train.data.blend import BlendPlan
from nemotron_train.data.loader import DataLoader, SampleReader
from nemotron_train.data.shard_format import HEADER_BYTES, bin_path, idx_path
from nemotron_train.data.shard_meta import (
    PROBE_BYTES,
    ManifestShard,
    SourceManifest,
    manifest_bytes,
    manifest_path,
    probe_hash,
)
from nemotron_train.data.tokenizer_file import tokenizer_hash
from nemotron_train.errors import ConfigError, DataError

S, VOCAB, EOD = 8, 100, 99
DOCUMENTS, LENGTH = 40, 10


def write_source(folder: Path, *, shards: int = 3) -> None:
    """Write shards of 40 documents of 10 tokens, with a manifest."""
    rng = np.random.default_rng(3)
    listed = []
    for number in range(shards):
        prefix = folder / f"web_{number:05d}"
        documents = [np.append(rng.integers(0, EOD, LENGTH - 1), EOD).astype("<u2") for _ in range(DOCUMENTS)]
        write_shard(prefix, documents, np.dtype("<u2"))
        tokens, index = bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()
        listed.append(
            ManifestShard(
                name=prefix.name,
                tokens=DOCUMENTS * LENGTH,
                documents=DOCUMENTS,
                bin_bytes=len(tokens),
                idx_bytes=len(index),
                bin_hash=xxhash.xxh3_128(tokens).hexdigest(),
                idx_hash=xxhash.xxh3_128(index).hexdigest(),
                probe_hash=probe_hash(tokens[:PROBE_BYTES], tokens[-PROBE_BYTES:]),
            )
        )
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(n): n for n in range(VOCAB)}}}))
    manifest = SourceManifest(
        source="web",
        dtype="uint16",
        max_id=EOD,
        eod_id=EOD,
        eod_terminated=True,
        tokenizer_hash=tokenizer_hash(folder / "tokenizer.json"),
        writer="test",
        shards=tuple(listed),
        made_from={},
    )
    manifest_path(folder, "web").write_bytes(manifest_bytes(manifest))


def section(folder: Path) -> DataSection:
    return DataSection(
        path=str(folder),
        eod_token=str(EOD),
        sources=[SourceConfig("web", prefixes=["web_*"])],
        phases=[PhaseConfig(0, [SourceWeight("web", 1.0)])],
    )


def flip(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(bytes(content))


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def replace_shard(folder: Path) -> None:
    """Put another shard of the same sizes in the place of one."""
    for suffix in (".bin", ".idx"):
        (folder / f"web_00001{suffix}").write_bytes((folder / f"web_00002{suffix}").read_bytes())


POINTERS = HEADER_BYTES + 4 * DOCUMENTS
BIN, IDX = "web_00001.bin", "web_00001.idx"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte cut off the tokens": (lambda f: cut(f / BIN, 1), rf"{BIN}: 799 bytes are no whole number"),
    "a token cut off": (lambda f: cut(f / BIN, 2), rf"{BIN}: 798 bytes, but .*{IDX} describes 800"),
    "a quarter cut off": (lambda f: cut(f / BIN, 200), rf"{BIN}: 600 bytes, but"),
    "the index cut": (lambda f: cut(f / IDX, 8), rf"{IDX}: .* The file is cut or its header damaged"),
    "one length edited": (
        lambda f: flip(f / IDX, HEADER_BYTES + 4 * 5, (5000).to_bytes(4, "little")),
        rf"{IDX}: sequence 6 points to byte 120, but the sequences before it end at 10100",
    ),
    "one pointer edited": (
        lambda f: flip(f / IDX, POINTERS + 8 * 7, (77).to_bytes(8, "little")),
        rf"{IDX}: sequence 7 points to byte 77",
    ),
    "a negative length": (
        lambda f: flip(f / IDX, HEADER_BYTES + 4 * 5, (-3).to_bytes(4, "little", signed=True)),
        rf"{IDX}: sequence 5 has length -3",
    ),
    "another dtype": (lambda f: flip(f / IDX, 17, b"\x03"), rf"{IDX}: dtype int16, its manifest says uint16"),
    "a wider dtype": (lambda f: flip(f / IDX, 17, b"\x04"), rf"{BIN}: .* describes"),
    "a token of another vocabulary": (
        lambda f: flip(f / BIN, 20, (60_000).to_bytes(2, "little")),
        rf"{BIN}: its first or last 65536 bytes \(from byte 0",
    ),
    "a bit of a token": (lambda f: flip(f / BIN, 20, b"\x03"), rf"{BIN}: its first or last"),
    "another shard in its place": (replace_shard, rf"{BIN}: its first or last"),
    "a shard gone": (lambda f: [(f / BIN).unlink(), (f / IDX).unlink()], r"web_00001\.idx is missing"),
    "the tokens gone": (lambda f: (f / BIN).unlink(), rf"{BIN}: No such file"),
    "another tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, str(EOD): EOD}}})),
        r"web\.manifest\.json: these shards were made with another tokenizer",
    ),
    "a manifest cut": (lambda f: cut(f / "web.manifest.json", 9), r"web\.manifest\.json is damaged"),
}
FOUND_WHEN_OPENED = [case for case in DAMAGE if case not in ("a shard gone", "another tokenizer", "a manifest cut")]


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_at_the_start(tmp_path: Path, case: str) -> None:
    """Fails if a run starts on damaged or exchanged files, or the message does not say which and where."""
    write_source(tmp_path)
    open_sources.open_data(section(tmp_path), VOCAB, S)
    damage, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_sources.open_data(section(tmp_path), VOCAB, S)


@pytest.mark.parametrize("case", FOUND_WHEN_OPENED)
def test_damage_among_very_many_shards_is_refused_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Fails if a batch with a token of a damaged shard reaches the trainer, or the start looks at every shard."""
    write_source(tmp_path)
    damage, message = DAMAGE[case]
    damage(tmp_path)
    monkeypatch.setattr(open_sources, "SHARDS_CHECKED_AT_START", 2)
    if "gone" in case:
        (tmp_path / "web_00001.idx").touch()  # still listed by the folder
    opened = open_sources.open_data(section(tmp_path), VOCAB, S)
    plan = open_sources.build_plan(section(tmp_path), opened.training, S, seed=0)
    good = min(sample for sample in range(100) if touches(plan, sample))
    with DataLoader(SampleReader(plan, opened.training), RankShare(0, 1, 1), lambda _: 1) as loader:
        assert len(list(islice(loader, good))) == good
        with pytest.raises(DataError, match=message if "gone" not in case else "web_00001"):
            next(loader)


def touches(plan: BlendPlan, sample: int) -> bool:
    """Whether a sample, or its last label, lies in the second shard."""
    spans = plan.locate(sample).spans
    tokens = {(span.start + i) % 1200 for span in spans for i in range(span.count)}
    return any(400 <= token < 800 for token in tokens)


IMPOSSIBLE_FACTS = {
    "another word for a dtype": ({"dtype": "foo"}, "dtype is foo, not one of uint8, "),
    "no largest token": ({"max_id": None}, "max_id is None"),
    "a number for a shard": ({"shards": [3]}, "has 3 in place of the facts of a shard"),
    "a number for all shards": ({"shards": 3}, "has no list of shards"),
    "made from nothing": ({"made_from": None}, "made_from is None"),
    "a truth for an id": ({"eod_id": True}, "eod_id is True"),
    "tokens in words": ({"tokens": "x"}, "tokens is 'x'"),
    "half a token": ({"tokens": 12.5}, "tokens is 12.5"),
    "fewer tokens than none": ({"tokens": -1}, "tokens is -1"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE_FACTS)
def test_a_manifest_that_cannot_be_true_is_refused(tmp_path: Path, case: str) -> None:
    """Fails if a fact of another type than it can have ends in a traceback, or is taken for true."""
    write_source(tmp_path)
    path = tmp_path / "web.manifest.json"
    content = json.loads(path.read_text())
    changes, message = IMPOSSIBLE_FACTS[case]
    (content["shards"][0] if "tokens" in changes else content).update(changes)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"web\.manifest\.json:? {message}"):
        open_sources.open_data(section(tmp_path), VOCAB, S)


def test_documents_that_do_not_end_as_asked_are_refused(tmp_path: Path) -> None:
    """Fails if data.document_boundary=reset runs on shards whose documents it cannot tell apart."""
    write_source(tmp_path)
    reset = replace(section(tmp_path), document_boundary=DocumentBoundary.reset)
    open_sources.open_data(reset, VOCAB, S)
    with pytest.raises(DataError, match=r"needs every document to end with token 98 .*these end with 99"):
        open_sources.open_data(replace(reset, eod_token="98"), VOCAB, S)
    with pytest.raises(ConfigError, match=r"has no token '<eod>' \(data.eod_token\)"):
        open_sources.open_data(replace(reset, eod_token="<eod>"), VOCAB, S)


def test_a_vocabulary_smaller_than_the_shards_is_refused_at_the_start(tmp_path: Path) -> None:
    """Fails if only the tokenizer's size is compared, and shards of a larger one run until a token is met."""
    write_source(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps({"model": {"vocab": {"x": 0}}}))
    content = json.loads((tmp_path / "web.manifest.json").read_text()) | {"tokenizer_hash": None}
    (tmp_path / "web.manifest.json").write_text(json.dumps(content))
    small = replace(section(tmp_path), tokenizer="small.json")
    with pytest.raises(DataError, match=r"these shards hold token 99; the model knows 0 \.\.\. 89"):
        open_sources.open_data(small, 90, S)


def test_manifests_of_other_sources_do_not_matter(tmp_path: Path) -> None:
    """Fails if a source made with another tokenizer cannot lie in the same folder, although no key names it."""
    write_source(tmp_path)
    content = json.loads((tmp_path / "web.manifest.json").read_text())
    content |= {"tokenizer_hash": "another", "source": "x", "shards": [{**content["shards"][0], "name": "x_00000"}]}
    (tmp_path / "x.manifest.json").write_text(json.dumps(content))
    open_sources.open_data(section(tmp_path), VOCAB, S)


def test_a_missing_shard_is_missed_whatever_its_folder_is_called(tmp_path: Path) -> None:
    """Fails if a letter of a path is taken for a pattern: the run would be one shard short without a word."""
    folder = tmp_path / "web[1]"
    folder.mkdir()
    write_source(folder)
    for suffix in (".bin", ".idx"):
        (folder / f"web_00001{suffix}").unlink()
    with pytest.raises(DataError, match=r"web_00001\.idx is missing"):
        open_sources.open_data(section(folder), VOCAB, S)


def test_a_missing_held_out_shard_is_missed(tmp_path: Path) -> None:
    """Fails if the held-out loss of a run is suddenly that of less text."""
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
        write_source(tmp_path / name)
    source = SourceConfig("web", prefixes=["web_*"], eval_prefixes=[str(tmp_path / "held" / "web_*")])
    data = replace(section(tmp_path / "train"), sources=[source])
    open_sources.open_data(data, VOCAB, S)
    (tmp_path / "held" / "web_00002.idx").unlink()
    with pytest.raises(DataError, match=r"held/web_00002\.idx is missing"):
        open_sources.open_data(data, VOCAB, S)


def test_how_documents_are_rearranged_is_part_of_the_past(tmp_path: Path) -> None:
    """Fails if a run goes on with other tokens or rates for fill-in-the-middle than those it has read with, or one
    without any is refused for them."""
    write_source(tmp_path)
    training = open_sources.open_data(section(tmp_path), VOCAB, S).training
    for rate, differ in ((0.5, True), (0.0, False)):
        phases = [PhaseConfig(0, [SourceWeight("web", 1.0, fim_rate=rate)])]
        plain = replace(section(tmp_path), phases=phases, fim_tokens=["1", "2", "3"])
        changed = [replace(plain, fim_spm_rate=0.9), replace(plain, fim_tokens=["1", "2", "4"])]
        hashes = [open_sources.build_plan(data, training, S, seed=0).past_hash(10 * S) for data in (plain, *changed)]
        assert (len(set(hashes)) == 3) is differ


def test_other_tokens_of_the_same_number_are_another_past(tmp_path: Path) -> None:
    """Fails if a source that was tokenized anew with another seed is taken for the one a run has read."""
    hashes = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        write_source(folder)
        if name == "other":
            content = json.loads((folder / "web.manifest.json").read_text())
            content["shards"][2]["bin_hash"] = "0"
            (folder / "web.manifest.json").write_text(json.dumps(content))
        opened = open_sources.open_data(section(folder), VOCAB, S)
        hashes.append(open_sources.build_plan(section(folder), opened.training, S, seed=0).past_hash(10 * S))
    assert hashes[0] != hashes[1]
