"""Does `tokenize` stay within its memory, and its folder clean, whatever the input? Oracle: the same work in one go."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from data_tools import documents, tokenize_work
from data_tools.documents import read_documents
from data_tools.parts import plan_parts
from data_tools.source_record import TokenizeSettings
from data_tools.spills import SpilledShard
from data_tools.tokenize_corpus import count_shards, tokenize
from nemotron_train.errors import DataError
from tests.data_tools.text import files_of, texts, write_jsonl


def test_a_shard_written_in_many_blocks_from_many_spills_is_the_same(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if documents are lost, doubled or reordered between blocks or spills, a fact of the meta file is that of
    one block, or a block holds more than its tokens."""
    source = write_jsonl(tmp_path / "web.jsonl", texts(300))
    settings = TokenizeSettings("web", tokenizer_path, num_shards=2)
    tokenize([source], tmp_path / "whole", settings, 1)
    held = []
    gather = SpilledShard.tokens_of

    def tokens_of(self: SpilledShard, numbers: np.ndarray) -> np.ndarray:
        tokens = gather(self, numbers)
        held.append((len(numbers), len(tokens)))
        return tokens

    monkeypatch.setattr(SpilledShard, "tokens_of", tokens_of)
    monkeypatch.setattr(tokenize_work, "BLOCK_TOKENS", 1000)
    monkeypatch.setattr(tokenize_work, "SPILL_TOKENS", 700)
    monkeypatch.setattr(tokenize_work, "BATCH_CHARACTERS", 500)
    tokenize([source], tmp_path / "blocks", settings, 1)
    assert files_of(tmp_path / "blocks") == files_of(tmp_path / "whole")
    assert len(held) > 20
    assert all(tokens <= 1000 or number == 1 for number, tokens in held)


def test_what_is_not_whole_lies_in_the_work_folder(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a process that is killed while it writes leaves a file among the shards, for ever."""
    seen: set[str] = set()
    sync = os.fsync

    def look(descriptor: int) -> None:
        seen.update(path.name for path in (tmp_path / "out").iterdir())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    tokenize(
        [write_jsonl(tmp_path / "web.jsonl", texts(50))], tmp_path / "out", TokenizeSettings("w", tokenizer_path), 1
    )
    assert seen == {".w.work", "w_00000.bin", "w_00000.meta.json", "w_00000.idx"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_a_text_too_long_to_hold_is_refused_with_its_place(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one endless line or text fills the memory, or a text just short enough is refused."""
    monkeypatch.setattr(documents, "LONGEST_BYTES", 200_000)
    for length, place in ((150_000, None), (300_000, "the line at byte 18|row 2|the text")):
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("small", "x" * length))
        plain = {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.zst": zstandard.compress(lines)}
        if name == "a.parquet":
            parquet.write_table(pyarrow.table({"text": ["small", "x" * length]}), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(plain.get(name, b"x" * length))
        if place is None:
            assert [len(document.text) for document in read_documents(tmp_path / name, "text", ())][-1] == length
        else:
            with pytest.raises(DataError, match=rf"a\..*: ({place}) has more than 200000 bytes"):
                list(read_documents(tmp_path / name, "text", ()))


def test_a_line_longer_than_many_parts_belongs_to_the_part_it_begins_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the parts within a long line read it, each anew, or take its rest for a document."""
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "x" * 1_000_000, "three"])
    found = [[d.text[:5] for d in part.documents("text", ())] for part in plan_parts([path], 100_000)]
    assert [part for part in found if part] == [["one", "xxxxx"], ["three"]]
    monkeypatch.setattr(documents, "READ_BYTES", 1000)
    with path.open("rb") as file:
        assert list(documents._lines_from(path, file, 300_000, 400_000)) == []
        assert file.tell() <= 401_000


def test_few_rows_of_long_texts_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a thousand books are held at once because a thousand tweets may be."""
    rng = np.random.default_rng(0)
    books = [rng.integers(97, 123, 1 << 20, dtype=np.uint8).tobytes().decode() for _ in range(12)]
    for name, rows in (("books", books), ("tweets", ["short"] * 3000)):
        parquet.write_table(pyarrow.table({"text": rows}), tmp_path / f"{name}.parquet")
    sizes = []
    read = parquet.ParquetFile.iter_batches

    def iter_batches(self: parquet.ParquetFile, batch_size: int, **options: object) -> object:
        sizes.append(batch_size)
        return read(self, batch_size=batch_size, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", iter_batches)
    assert [d.text for d in read_documents(tmp_path / "books.parquet", "text", ())] == books
    assert len(list(read_documents(tmp_path / "tweets.parquet", "text", ()))) == 3000
    assert sizes[0] <= 8 < 1000 < sizes[1]


def test_small_texts_are_gathered_into_parts_by_their_bytes(tmp_path: Path) -> None:
    """Fails if some thousand files of a megabyte are one part: one process would do the work of all."""
    for number in range(100):
        (tmp_path / f"{number:03d}.txt").write_text("ten bytes!")
    parts = plan_parts(sorted(tmp_path.iterdir()), 700)
    assert [(len(part.files), part.num_bytes) for part in parts] == [(70, 700), (30, 300)]


def test_formats_of_the_same_text_give_about_as_many_shards(tmp_path: Path) -> None:
    """Fails if compressed text counts by its bytes on disk, or Parquet, which tells its size uncompressed, for more."""
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, 6, dtype=np.uint8).tobytes().decode() for _ in range(300)]
    made = [" ".join(rng.choice(words, 2000)) for _ in range(50)]
    path = write_jsonl(tmp_path / "a.jsonl", made)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(path.read_bytes()))
    parquet.write_table(pyarrow.table({"text": made}), tmp_path / "a.parquet")
    plain, zst, columns = (
        count_shards(plan_parts([tmp_path / name]), 1000) for name in ("a.jsonl", "a.jsonl.zst", "a.parquet")
    )
    assert plain / 2 < zst < plain * 2
    assert plain * 0.8 < columns < plain * 1.2


def test_a_process_of_tokenize_imports_nothing_it_does_not_need() -> None:
    """Fails if every process that tokenizes loads torch and matplotlib: a quarter of a GiB and seconds each."""
    program = (
        "import sys; from data_tools.__main__ import main\n"
        "try: main(['tokenize', '--help'])\n"
        "except SystemExit: pass\n"
        "print('needs', *(name for name in ('torch', 'matplotlib', 'hydra', 'megatron') if name in sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "--tokenizer" in printed
    assert printed.splitlines()[-1] == "needs"
