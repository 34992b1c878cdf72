"""How do tokens become a shard on disk? Whole or not at all: temporary names, sync, rename, the .idx last."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron_train.data.shard_format import bin_path, idx_path, write_index
from nemotron_train.data.shard_meta import PROBE_BYTES, ShardMeta, meta_bytes, meta_path, probe_hash
from nemotron_train.errors import DataError

WRITTEN_TOKENS = 1 << 18  # at once: few enough to stay in the processor's cache while they are hashed and counted


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents back to back, as one array and their lengths."""

    tokens: NDArray
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class ShardOrigin:
    """What a shard's `.meta.json` says of where its tokens are from, and where its files grow until they are whole."""

    eod_id: int
    tokenizer_hash: str
    scratch: Path  # a folder of the same file system


def write_shard(prefix: Path, documents: Iterable[NDArray], dtype: np.dtype) -> None:
    """Write documents, in the order given, as PREFIX.bin and PREFIX.idx."""
    lengths: list[int] = []

    def write_tokens(file: BinaryIO) -> None:
        for document in documents:
            file.write(document.astype(dtype, copy=False).tobytes())
            lengths.append(len(document))

    write_whole(bin_path(prefix), write_tokens)
    # The index last: a shard is what has an index, so no reader ever meets one without its tokens.
    write_whole(idx_path(prefix), lambda file: write_index(file, dtype, lengths))


def write_shuffled_shard(
    prefix: Path, lengths: NDArray[np.int64], blocks: Iterable[NDArray], dtype: np.dtype, origin: ShardOrigin
) -> ShardMeta:
    """Write documents that come in blocks, with `PREFIX.meta.json` beside them.

    Args:
        lengths: of all documents, in their order.
        blocks: the tokens of the same documents, some whole ones at a time.
    """
    digest, index_digest = xxhash.xxh3_128(), xxhash.xxh3_128()
    ends, tokens, eod_count, eods_at_ends, max_id = np.cumsum(lengths), 0, 0, 0, 0

    def write_tokens(file: BinaryIO) -> None:
        nonlocal tokens, eod_count, eods_at_ends, max_id
        for block in blocks:
            for start in range(0, len(block), WRITTEN_TOKENS):
                piece = block[start : start + WRITTEN_TOKENS]
                digest.update(piece.data)
                file.write(piece.data)
                eod_count += int(np.count_nonzero(piece == origin.eod_id))
                max_id = max(max_id, int(piece.max()))
            first, end = np.searchsorted(ends, (tokens, tokens + len(block)), side="right").tolist()
            eods_at_ends += int(np.count_nonzero(block[ends[first:end] - tokens - 1] == origin.eod_id))
            tokens += len(block)

    def write_lengths(file: BinaryIO) -> None:
        write_index(_Hashed(file, index_digest), dtype, lengths)

    write_whole(bin_path(prefix), write_tokens, origin.scratch)
    size = tokens * dtype.itemsize
    with bin_path(prefix).open("rb") as file:
        head = file.read(PROBE_BYTES)
        file.seek(max(0, size - PROBE_BYTES))
        probe = probe_hash(head, file.read())
    index = origin.scratch / f"{idx_path(prefix).name}.next"
    write_whole(index, write_lengths)
    meta = ShardMeta(
        tokens=tokens,
        documents=len(lengths),
        dtype=dtype.name,
        max_id=max_id,
        eod_id=origin.eod_id,
        eod_count=eod_count,
        eod_terminated=eod_count == eods_at_ends == len(lengths),
        tokenizer_hash=origin.tokenizer_hash,
        bin_bytes=size,
        idx_bytes=index.stat().st_size,
        bin_hash=digest.hexdigest(),
        idx_hash=index_digest.hexdigest(),
        probe_hash=probe,
        writer=writer_name(),
    )
    write_whole(meta_path(prefix), lambda file: file.write(meta_bytes(meta)), origin.scratch)
    index.replace(idx_path(prefix))  # last: a shard is what has an index
    return meta


def writer_name() -> str:
    """Return the name and version of this program, as shards record it."""
    try:
        return f"nemotron-train {version('nemotron-train')}"
    except PackageNotFoundError:  # runs from a folder
        return "nemotron-train"


def write_whole(path: Path, write: Callable[[BinaryIO], object], scratch: Path | None = None) -> None:
    """Create or replace a file so that, whenever the process dies, there is the old content or the new one.

    Args:
        scratch: a folder of the same file system for the unfinished file, which a killed process leaves behind; left
            out, it lies beside `path`.

    Raises:
        DataError: the file cannot be written, e.g. because the disk is full; nothing of it is left.
    """
    # Several processes, perhaps on several machines, may write the same content at once: not the process id alone.
    temporary = (scratch or path.parent) / f"{path.name}.{uuid4().hex}.tmp"
    try:
        with temporary.open("wb", buffering=1 << 20) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error.strerror}.") from error


class _Hashed:
    """A file whose content is hashed as it is written."""

    def __init__(self, file: BinaryIO, digest: xxhash.xxh3_128) -> None:
        self._file, self._digest = file, digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)
