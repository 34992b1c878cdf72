"""How are shards put together and cut apart in constant memory? Tokens and indices pass through in blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.shard_writer import write_whole, writer_name
from nemotron_train.data.shard_format import (
    HEADER_BYTES,
    MAGIC,
    VERSION,
    ShardLayout,
    Writable,
    bin_path,
    check_documents,
    dtype_code,
    idx_path,
    read_array,
    read_layout,
)
from nemotron_train.data.shard_meta import PROBE_BYTES, ShardMeta, meta_bytes, meta_path, probe_hash, read_meta
from nemotron_train.errors import DataError

_Value = TypeVar("_Value", int, str)

BLOCK_BYTES = 1 << 24
BLOCK_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Documents `first` ... `end - 1` of a shard, with the sequences and tokens they take."""

    layout: ShardLayout
    first: int
    end: int
    first_sequence: int
    end_sequence: int
    first_byte: int
    end_byte: int


def open_checked(prefix: Path) -> ShardLayout:
    """Open a shard whose whole index is in order.

    Raises:
        DataError: it is damaged, or multimodal.
    """
    layout = read_layout(prefix)
    plain = HEADER_BYTES + 12 * layout.num_sequences + 8 * layout.num_boundaries
    if layout.num_sequences and layout.idx_path.stat().st_size != plain:
        raise DataError(f"{layout.idx_path} has modes of sequences: multimodal shards cannot be merged or split.")
    check_documents(layout)
    return layout


def piece_of(layout: ShardLayout, first: int, end: int) -> Piece:
    """Return some documents of a shard."""
    starts = [document_start(layout, at) for at in (first, end)]
    return Piece(layout, first, end, *(sequence for sequence, _ in starts), *(byte for _, byte in starts))


def document_start(layout: ShardLayout, document: int) -> tuple[int, int]:
    """Return the sequence and the byte a document begins with; of the document after the last, where the shard ends."""
    sequence = int(read_array(layout.idx_path, layout.boundaries_offset + 8 * document, "<i8", 1)[0])
    if sequence == layout.num_sequences:
        return sequence, layout.num_tokens * layout.dtype.itemsize
    return sequence, int(read_array(layout.idx_path, layout.pointers_offset + 8 * sequence, "<i8", 1)[0])


def write_pieces(prefix: Path, pieces: Sequence[Piece]) -> ShardMeta:
    """Write pieces, one after the other, as one shard with its `.meta.json`.

    Raises:
        DataError: there is such a shard already, or the pieces differ in dtype.
    """
    for path in (bin_path(prefix), idx_path(prefix), meta_path(prefix)):
        if path.exists():
            raise DataError(f"{path} exists and is not overwritten. Choose another --output.")
    dtypes = {piece.layout.dtype: piece.layout.idx_path for piece in pieces}
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} in {path}" for dtype, path in dtypes.items())
        raise DataError(f"Shards of several dtypes cannot be merged: {found}. Tokenize them alike.")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    facts = _Facts(pieces)

    def write_tokens(file: Writable) -> None:
        for piece in pieces:
            for block in _bytes_of(piece):
                facts.add(block)
                file.write(block)

    write_whole(bin_path(prefix), write_tokens)
    write_whole(idx_path(prefix), lambda file: _write_index(file, pieces, facts))
    meta = facts.meta(prefix)
    write_whole(meta_path(prefix), lambda file: file.write(meta_bytes(meta)))
    return meta


def _write_index(file: Writable, pieces: Sequence[Piece], facts: "_Facts") -> None:
    sequences = sum(piece.end_sequence - piece.first_sequence for piece in pieces)
    documents = sum(piece.end - piece.first for piece in pieces)
    item = pieces[0].layout.dtype.itemsize

    def write(data: bytes) -> None:
        facts.index_digest.update(data)
        file.write(data)

    write(MAGIC + VERSION.to_bytes(8, "little") + bytes([dtype_code(pieces[0].layout.dtype)]))
    write(sequences.to_bytes(8, "little") + (documents + 1).to_bytes(8, "little"))
    for piece in pieces:
        for lengths in _lengths_of(piece):
            write(lengths.astype("<i4").tobytes())
    at = 0
    for piece in pieces:
        for lengths in _lengths_of(piece):
            ends = at + np.cumsum(lengths.astype(np.int64)) * item
            write(np.concatenate(([at], ends[:-1])).astype("<i8").tobytes())
            at = int(ends[-1])
    write(bytes(8))
    before = 0
    for piece in pieces:
        offset = piece.layout.boundaries_offset + 8 * (piece.first + 1)
        for bounds in _blocks(piece.layout.idx_path, offset, "<i8", piece.end - piece.first):
            write((bounds - piece.first_sequence + before).astype("<i8").tobytes())
        before += piece.end_sequence - piece.first_sequence


def _lengths_of(piece: Piece) -> Iterator[NDArray]:
    """Yield the lengths of a piece's sequences, in blocks."""
    offset = HEADER_BYTES + 4 * piece.first_sequence
    return _blocks(piece.layout.idx_path, offset, "<i4", piece.end_sequence - piece.first_sequence)


def _blocks(path: Path, offset: int, dtype: str, count: int) -> Iterator[NDArray]:
    for start in range(0, count, BLOCK_ENTRIES):
        yield read_array(path, offset + start * np.dtype(dtype).itemsize, dtype, min(BLOCK_ENTRIES, count - start))


def _bytes_of(piece: Piece) -> Iterator[bytes]:
    with piece.layout.bin_path.open("rb") as file:
        file.seek(piece.first_byte)
        left = piece.end_byte - piece.first_byte
        while left:
            block = file.read(min(BLOCK_BYTES, left))
            if not block:
                raise DataError(f"{piece.layout.bin_path} ends {left} bytes early. The file was cut while it was read.")
            left -= len(block)
            yield block


class _Facts:
    """Gathers what the meta file says while tokens pass by. What documents end with is known if all pieces say so."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        metas = [read_meta(piece.layout.prefix) for piece in pieces]
        known = [meta for meta in metas if meta is not None]
        self._dtype = pieces[0].layout.dtype
        self._documents = sum(piece.end - piece.first for piece in pieces)
        self._eod_id = _common([meta.eod_id for meta in known]) if len(known) == len(metas) else None
        self._terminated = self._eod_id is not None and all(meta.eod_terminated for meta in known)
        self._tokenizer = _common([meta.tokenizer_hash for meta in known]) if len(known) == len(metas) else None
        self._digest, self.index_digest = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._tokens, self._max, self._eods = 0, 0, 0

    def add(self, block: bytes) -> None:
        tokens = np.frombuffer(block, dtype=self._dtype)
        self._digest.update(block)
        self._tokens += len(tokens)
        self._max = max(self._max, int(tokens.max()))
        if self._eod_id is not None:
            self._eods += int(np.count_nonzero(tokens == self._eod_id))

    def meta(self, prefix: Path) -> ShardMeta:
        size = bin_path(prefix).stat().st_size
        with bin_path(prefix).open("rb") as file:
            head = file.read(PROBE_BYTES)
            file.seek(max(0, size - PROBE_BYTES))
            probe = probe_hash(head, file.read())
        return ShardMeta(
            tokens=self._tokens,
            documents=self._documents,
            dtype=self._dtype.name,
            max_id=self._max,
            eod_id=self._eod_id,
            eod_count=self._eods,
            eod_terminated=self._terminated and self._eods == self._documents,
            tokenizer_hash=self._tokenizer,
            bin_bytes=size,
            idx_bytes=idx_path(prefix).stat().st_size,
            bin_hash=self._digest.hexdigest(),
            idx_hash=self.index_digest.hexdigest(),
            probe_hash=probe,
            writer=writer_name(),
        )


def _common(values: Sequence[_Value | None]) -> _Value | None:
    """Return the value all have, None if they differ."""
    return values[0] if values and len(set(values)) == 1 else None
