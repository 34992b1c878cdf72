"""How do tokens become a shard on disk? Whole or not at all: temporary names, sync, rename, the .idx last."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron_train.data.shard_format import bin_path, idx_path, write_index
from nemotron_train.data.shard_meta import PROBE_BYTES, ShardMeta, meta_bytes, meta_path, probe_hash
from nemotron_train.errors import DataError


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents back to back, as one array and their lengths."""

    tokens: NDArray
    lengths: NDArray[np.int64]


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
    prefix: Path, documents: TokenizedDocuments, order: NDArray[np.int64], eod_id: int, tokenizer_hash: str
) -> ShardMeta:
    """Write documents in another order, with `PREFIX.meta.json` beside them."""
    tokens, lengths = documents.tokens, documents.lengths
    ends = np.cumsum(lengths)
    starts, shuffled = (ends - lengths)[order], lengths[order]
    digest, index_digest = xxhash.xxh3_128(), xxhash.xxh3_128()

    def write_tokens(file: BinaryIO) -> None:
        for start, length in zip(starts.tolist(), shuffled.tolist(), strict=True):
            data = tokens[start : start + length].tobytes()
            digest.update(data)
            file.write(data)

    def write_lengths(file: BinaryIO) -> None:
        write_index(_Hashed(file, index_digest), tokens.dtype, shuffled)

    write_whole(bin_path(prefix), write_tokens)
    size = tokens.nbytes
    with bin_path(prefix).open("rb") as file:
        head = file.read(PROBE_BYTES)
        file.seek(max(0, size - PROBE_BYTES))
        probe = probe_hash(head, file.read())
    eod_count = int(np.count_nonzero(tokens == eod_id))
    index = idx_path(prefix).with_name(f"{idx_path(prefix).name}.next")
    write_whole(index, write_lengths)
    meta = ShardMeta(
        tokens=len(tokens),
        documents=len(lengths),
        dtype=tokens.dtype.name,
        max_id=int(tokens.max()),
        eod_id=eod_id,
        eod_count=eod_count,
        eod_terminated=eod_count == len(lengths) and bool((tokens[ends - 1] == eod_id).all()),
        tokenizer_hash=tokenizer_hash,
        bin_bytes=size,
        idx_bytes=index.stat().st_size,
        bin_hash=digest.hexdigest(),
        idx_hash=index_digest.hexdigest(),
        probe_hash=probe,
        writer=writer_name(),
    )
    write_whole(meta_path(prefix), lambda file: file.write(meta_bytes(meta)))
    index.replace(idx_path(prefix))  # last: a shard is what has an index
    return meta


def writer_name() -> str:
    """Return the name and version of this program, as shards record it."""
    try:
        return f"nemotron-train {version('nemotron-train')}"
    except PackageNotFoundError:  # runs from a folder
        return "nemotron-train"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace a file so that, whenever the process dies, there is the old content or the new one.

    Raises:
        DataError: the file cannot be written, e.g. because the disk is full; nothing of it is left.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same content at once
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
