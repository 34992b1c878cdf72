"""What do the bytes of a Megatron shard mean? The one place that knows the layout of `PREFIX.idx` and `PREFIX.bin`.

A shard is one `.bin` (token ids back to back: no header, padding or checksum) and one `.idx` (little endian):

    offset  size   field
    0       9      magic
    9       8      u64  version, 1
    17      1      u8   dtype code of the tokens, see DTYPE_CODES
    18      8      u64  S, number of sequences
    26      8      u64  D, number of document boundaries = documents + 1
    34      4 S    i32  tokens of each sequence
    ...     8 S    i64  byte offset of each sequence in the .bin
    ...     8 D    i64  sequence at which each document starts, and S at the end
    ...     S      i8   sequence modes; only multimodal shards have them, and we skip them

`read_layout` costs one short read and two stats however large the shard is; `check_documents` reads the whole index.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemotron_train.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
UINT16_VOCAB_LIMIT = 65_500  # Megatron's: from here on the tokens are written as int32
_CHECK_BLOCK = 1 << 20  # sequences checked at once: bounds memory for shards with billions of documents


class Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class ShardLayout:
    """Where everything in one shard lies. Exists only for shards whose header and file sizes agree."""

    prefix: Path
    dtype: np.dtype
    num_sequences: int
    num_boundaries: int  # documents + 1
    num_tokens: int

    @property
    def bin_path(self) -> Path:
        return bin_path(self.prefix)

    @property
    def idx_path(self) -> Path:
        return idx_path(self.prefix)

    @property
    def pointers_offset(self) -> int:
        return HEADER_BYTES + 4 * self.num_sequences

    @property
    def boundaries_offset(self) -> int:
        return HEADER_BYTES + 12 * self.num_sequences


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")  # not with_suffix: prefixes may contain dots


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype Megatron writes token ids of such a vocabulary in."""
    return DTYPE_CODES[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPE_CODES[4]


def read_layout(prefix: Path | str) -> ShardLayout:
    """Read the header of a shard and check it against the sizes of both files.

    Raises:
        DataError: a file is missing, its magic, version or dtype code unknown, or counts do not fit the file sizes.
    """
    idx, tokens_file = idx_path(prefix), bin_path(prefix)
    idx_bytes, bin_bytes = _file_size(idx), _file_size(tokens_file)
    with idx.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise DataError(f"{idx}: {len(header)} bytes are too few for the {HEADER_BYTES}-byte header of a shard index.")
    if header[:9] != MAGIC:
        raise DataError(f"{idx}: starts with {header[:9]!r}, a Megatron shard index with {MAGIC!r}.")
    version = int.from_bytes(header[9:17], "little")
    if version != VERSION:
        raise DataError(f"{idx}: index version {version}; only version {VERSION} is known.")
    if header[17] not in DTYPE_CODES:
        raise DataError(f"{idx}: dtype code {header[17]} is none of {sorted(DTYPE_CODES)}.")
    dtype = DTYPE_CODES[header[17]]
    sequences, boundaries = (int.from_bytes(header[at : at + 8], "little") for at in (18, 26))
    expected = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if idx_bytes not in (expected, expected + sequences):
        raise DataError(
            f"{idx}: {idx_bytes} bytes, but its header ({sequences} sequences, {boundaries} document boundaries) "
            f"asks for {expected}. The file is cut or its header damaged."
        )
    if bin_bytes % dtype.itemsize:
        raise DataError(
            f"{tokens_file}: {bin_bytes} bytes are no whole number of {dtype.itemsize}-byte tokens ({dtype})."
        )
    layout = ShardLayout(Path(prefix), dtype, sequences, boundaries, bin_bytes // dtype.itemsize)
    promised = _promised_tokens(layout)
    if promised != layout.num_tokens:
        raise DataError(
            f"{tokens_file}: {bin_bytes} bytes, but {idx} describes {promised * dtype.itemsize} "
            f"({promised} {dtype} tokens). One of the two files is cut, damaged, or belongs to another shard."
        )
    return layout


def check_documents(layout: ShardLayout) -> None:
    """Check every length, pointer and document boundary of a shard's index.

    Raises:
        DataError: a length is negative, a pointer is not the running sum of the lengths, or document boundaries do not
            rise from 0 to S.
    """
    at_sequence, at_byte = 0, 0
    for lengths in _blocks(layout.idx_path, HEADER_BYTES, "<i4", layout.num_sequences):
        if (lengths < 0).any():
            worst = int(np.flatnonzero(lengths < 0)[0])
            raise DataError(f"{layout.idx_path}: sequence {at_sequence + worst} has length {lengths[worst]}.")
        offset = layout.pointers_offset + 8 * at_sequence
        pointers = read_array(layout.idx_path, offset, "<i8", len(lengths))
        ends = at_byte + np.cumsum(lengths, dtype=np.int64) * layout.dtype.itemsize
        expected = np.concatenate(([at_byte], ends[:-1]))
        wrong = np.flatnonzero(pointers != expected)
        if wrong.size:
            raise DataError(
                f"{layout.idx_path}: sequence {at_sequence + wrong[0]} points to byte {pointers[wrong[0]]}, "
                f"but the sequences before it end at {expected[wrong[0]]}. A length or a pointer is damaged."
            )
        at_sequence, at_byte = at_sequence + len(lengths), int(ends[-1])
    if at_byte != layout.num_tokens * layout.dtype.itemsize:
        raise DataError(
            f"{layout.bin_path}: {layout.num_tokens * layout.dtype.itemsize} bytes, but the lengths in "
            f"{layout.idx_path} add up to {at_byte}."
        )
    _check_boundaries(layout)


def read_array(path: Path, offset: int, dtype: str, count: int) -> NDArray:
    """Read `count` little-endian numbers at a byte offset; a short read is an error, never uninitialised memory."""
    array = np.fromfile(path, dtype=np.dtype(dtype), count=count, offset=offset)
    if len(array) != count:
        raise DataError(f"{path}: only {len(array)} of {count} {dtype} numbers at byte {offset}. The file is cut.")
    return array


def write_index(file: Writable, dtype: np.dtype, lengths: ArrayLike, boundaries: ArrayLike | None = None) -> None:
    """Write the index of a shard whose sequences lie back to back.

    Args:
        lengths: tokens of each sequence, in file order.
        boundaries: sequence at which each document starts, and their number at the end; left out, every sequence is
            one document.
    """
    wide = np.asarray(lengths, dtype=np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > np.iinfo(np.int32).max):
        raise DataError(f"A document of {wide.max()} tokens does not fit the format: at most {np.iinfo(np.int32).max}.")
    pointers = np.zeros(len(wide), dtype="<i8")
    np.cumsum(wide[:-1] * dtype.itemsize, out=pointers[1:])
    starts = np.arange(len(wide) + 1, dtype="<i8") if boundaries is None else np.asarray(boundaries, dtype="<i8")
    file.write(MAGIC + VERSION.to_bytes(8, "little") + bytes([dtype_code(dtype)]))
    file.write(len(wide).to_bytes(8, "little") + len(starts).to_bytes(8, "little"))
    for array in (wide.astype("<i4"), pointers, starts):
        file.write(array.tobytes())


def dtype_code(dtype: np.dtype) -> int:
    for code, known in DTYPE_CODES.items():
        if known == dtype:
            return code
    known_dtypes = ", ".join(str(known) for known in DTYPE_CODES.values())
    raise DataError(f"Tokens of dtype {dtype} cannot be written; the format knows {known_dtypes}.")


def _file_size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. A shard is a .bin and an .idx file of the same prefix.") from error


def _promised_tokens(layout: ShardLayout) -> int:
    """Return how many tokens the last index entry says the .bin holds."""
    if layout.num_sequences == 0:
        return 0
    last = layout.num_sequences - 1
    length = int(read_array(layout.idx_path, HEADER_BYTES + 4 * last, "<i4", 1)[0])
    pointer = int(read_array(layout.idx_path, layout.pointers_offset + 8 * last, "<i8", 1)[0])
    if length < 0 or pointer < 0 or pointer % layout.dtype.itemsize:
        raise DataError(f"{layout.idx_path}: its last sequence has length {length} and byte offset {pointer}.")
    return pointer // layout.dtype.itemsize + length


def _check_boundaries(layout: ShardLayout) -> None:
    """Check that the document boundaries rise from 0 to the number of sequences."""
    last = 0
    blocks = _blocks(layout.idx_path, layout.boundaries_offset, "<i8", layout.num_boundaries)
    for number, block in enumerate(blocks):
        if number == 0 and block[0] != 0:
            raise DataError(f"{layout.idx_path}: the first document starts at sequence {block[0]}, not 0.")
        if (np.diff(block, prepend=last) < 0).any():
            raise DataError(f"{layout.idx_path}: document boundaries do not rise.")
        last = int(block[-1])
    if last != layout.num_sequences:
        raise DataError(f"{layout.idx_path}: documents end at sequence {last} of {layout.num_sequences}.")


def _blocks(path: Path, offset: int, dtype: str, count: int) -> Iterator[NDArray]:
    item = np.dtype(dtype).itemsize
    for start in range(0, count, _CHECK_BLOCK):
        yield read_array(path, offset + start * item, dtype, min(_CHECK_BLOCK, count - start))
