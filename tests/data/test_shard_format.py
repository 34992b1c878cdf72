"""Oracle: megatron.core's own reader and builder of indexed datasets."""

import warnings
from pathlib import Path

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron-Core warns about every optional package
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

import torch

from data_tools.shard_writer import write_shard
from nemotron_train.data.shard import OpenFiles, Shard
from nemotron_train.data.shard_format import DTYPE_CODES, check_documents, read_layout, token_dtype
from nemotron_train.errors import DataError

DTYPES = [np.dtype(dtype) for dtype in DTYPE_CODES.values()]


def documents_of(dtype: np.dtype) -> list[np.ndarray]:
    """Documents of many lengths, one of them empty, with the extreme values of the dtype."""
    random = np.random.default_rng(0)
    info = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    documents = [random.integers(0, 100, size=length).astype(dtype) for length in (5, 1, 0, 700, 33)]
    documents[3][:2] = info.min, info.max
    return documents


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_megatron_reads_the_shards_we_write(tmp_path: Path, dtype: np.dtype) -> None:
    """Fails if a field of the index is missing, misplaced or of another width than Megatron's."""
    documents = documents_of(dtype)
    write_shard(tmp_path / "ours", documents, dtype)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(documents)
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    for number, document in enumerate(documents):
        assert theirs[number].dtype == dtype
        assert theirs[number].tobytes() == document.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_we_read_the_shards_megatron_writes(tmp_path: Path, dtype: np.dtype) -> None:
    """Fails if a dtype code is taken for another one, or documents of several sequences end in the wrong place."""
    documents = documents_of(dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.dtype_from_code(_code(dtype)))
    for document in documents:
        # item by item through torch, which has no uint16: as Megatron's own tools do it
        builder.add_item(torch.tensor(document.tolist(), dtype=torch.float64 if dtype.kind == "f" else torch.int64))
        if len(document) != 1:  # the document of one token continues with the next sequence
            builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    shard = Shard(tmp_path / "theirs")
    stream = np.concatenate(documents)
    assert shard.dtype == dtype
    assert shard.read(0, shard.num_tokens).tobytes() == stream.tobytes()
    assert shard.read(4, 9).tobytes() == stream[4:13].tobytes()
    assert shard.document_ends().tolist() == [5, 6, 706, 739]


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_535, 65_536, 65_537])
def test_dtype_of_a_vocabulary_is_megatrons(vocab_size: int) -> None:
    """Fails if the switch from uint16 to int32 moves: the same corpus would no longer have the same bytes."""
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    """Fails if a shard without documents cannot be written or opened."""
    write_shard(tmp_path / "empty", [], np.dtype("<i4"))
    assert Shard(tmp_path / "empty").num_tokens == 0
    assert Shard(tmp_path / "empty").document_ends().tolist() == []


def test_a_large_index_is_checked_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the running sum or the numbering of sequences is lost between two blocks of the check."""
    monkeypatch.setattr("nemotron_train.data.shard_format._CHECK_BLOCK", 3)
    write_shard(tmp_path / "many", [np.arange(length) for length in range(1, 12)], np.dtype("<u2"))
    layout = read_layout(tmp_path / "many")
    check_documents(layout)
    _overwrite(layout.idx_path, layout.pointers_offset + 8 * 7, (57).to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"many\.idx: sequence 7 points to byte 57, .* end at 56"):
        check_documents(layout)


# The index of three documents of 4, 2 and 6 int32 tokens: lengths at 34, pointers at 46, document boundaries at 70.
DAMAGE = {
    "bin cut by a byte": ("bin", 47, None, r"shard\.bin: 47 bytes are no whole number of 4-byte tokens"),
    "bin cut by a token": ("bin", 44, None, r"shard\.bin: 44 bytes, but .*shard\.idx describes 48"),
    "bin longer by a token": ("bin", 48, b"\0\0\0\0", r"shard\.bin: 52 bytes, but .*shard\.idx describes 48"),
    "bin empty": ("bin", 0, None, r"shard\.bin: 0 bytes, but .*shard\.idx describes 48"),
    "idx cut in the header": ("idx", 20, None, r"shard\.idx: 20 bytes are too few"),
    "idx cut by a byte": ("idx", 101, None, r"shard\.idx: 101 bytes, but its header .* asks for 102"),
    "magic": ("idx", 0, b"X", r"shard\.idx: starts with b'XMIDIDX"),
    "version": ("idx", 9, b"\2", r"shard\.idx: index version 2"),
    "unknown dtype": ("idx", 17, b"\x09", r"shard\.idx: dtype code 9"),
    "another dtype": ("idx", 17, b"\x08", r"shard\.idx describes 36|shard\.bin: 48 bytes, but"),
    "number of sequences": ("idx", 18, b"\4", r"shard\.idx: 102 bytes, but its header \(4 sequences"),
    "number of boundaries": ("idx", 26, b"\3", r"shard\.idx: 102 bytes, but its header"),
    "a length": ("idx", 34, b"\5", r"shard\.idx: sequence 1 points to byte 16, but the sequences before it end at 20"),
    "the last length": ("idx", 42, b"\7", r"shard\.bin: 48 bytes, but .*shard\.idx describes 52"),
    "a negative length": ("idx", 38, b"\xff\xff\xff\xff", r"shard\.idx: sequence 1 has length -1"),
    "the last length negative": ("idx", 42, b"\xff\xff\xff\xff", r"shard\.idx: its last sequence has length -1"),
    "a pointer": ("idx", 54, b"\x15", r"shard\.idx: sequence 1 points to byte 21, but .* end at 16"),
    "the last pointer": ("idx", 62, b"\x1c", r"shard\.bin: 48 bytes, but .*shard\.idx describes 52"),
    "the first boundary": ("idx", 70, b"\1", r"shard\.idx: the first document starts at sequence 1"),
    "a boundary out of order": ("idx", 78, b"\3", r"shard\.idx: document boundaries do not rise"),
    "the last boundary": ("idx", 94, b"\2", r"shard\.idx: documents end at sequence 2 of 3"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_refused_with_file_and_reason(tmp_path: Path, damage: str) -> None:
    """Fails if this damage goes unnoticed at open, or the message does not say where it is."""
    suffix, at, new, message = DAMAGE[damage]
    write_shard(tmp_path / "shard", [np.arange(4), np.arange(2), np.arange(6)], np.dtype("<i4"))
    path = tmp_path / f"shard.{suffix}"
    if new is None:
        path.write_bytes(path.read_bytes()[:at])
    else:
        _overwrite(path, at, new)
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "shard")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    """Fails if half a shard is an unexplained FileNotFoundError."""
    write_shard(tmp_path / "shard", [np.arange(4)], np.dtype("<i4"))
    (tmp_path / f"shard.{suffix}").unlink()
    with pytest.raises(DataError, match=rf"shard\.{suffix}: No such file"):
        Shard(tmp_path / "shard")


def test_a_shard_cut_after_it_was_opened_is_refused_at_the_read(tmp_path: Path) -> None:
    """Fails if a short read returns fewer tokens, or memory that was never in the file."""
    write_shard(tmp_path / "shard", [np.arange(100)], np.dtype("<i4"))
    shard = Shard(tmp_path / "shard")
    with (tmp_path / "shard.bin").open("r+b") as file:
        file.truncate(399)
    assert shard.read(0, 99).tolist() == list(range(99))
    with pytest.raises(DataError, match=r"shard\.bin: only 359 of 360 bytes at byte 40"):
        shard.read(10, 90)


def test_open_files_are_bounded_and_still_read_right(tmp_path: Path) -> None:
    """Fails if more files stay open than allowed, or a file that was closed is read as another one."""
    files = OpenFiles(limit=2)
    for number in range(5):
        write_shard(tmp_path / f"s{number}", [np.full(10, number)], np.dtype("<i4"))
    shards = [Shard(tmp_path / f"s{number}", files) for number in range(5)]
    for number in (0, 1, 2, 0, 4, 3, 0):
        assert shards[number].read(3, 4).tolist() == [number] * 4
        assert len(files._descriptors) <= 2
    files.close()


def _code(dtype: np.dtype) -> int:
    return next(code for code, known in DTYPE_CODES.items() if known == dtype)


def _overwrite(path: Path, at: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(bytes(content))
