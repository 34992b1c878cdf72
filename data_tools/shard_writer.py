"""How do tokens become a shard on disk? Whole or not at all: temporary names, sync, rename, the .idx last.

The documents of a shard are written in a random order that follows from the seed and the shard's number: training
reads windows of neighbouring documents, so neighbours on disk must not come from the same corner of the input.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemotron_train.data.shard_format import bin_path, idx_path, write_index
from nemotron_train.errors import DataError


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents back to back, as one array and their lengths."""

    tokens: NDArray
    lengths: NDArray[np.int64]


@dataclass
class ShardWriter:
    """Collects documents in memory and writes a shard whenever one is full: memory is that of one shard and a batch."""

    folder: Path
    name: str
    dtype: np.dtype
    shard_tokens: int  # a shard is closed by the document that brings it to this many
    seed: int
    shard_names: list[str] = field(default_factory=list)  # of the shards written so far
    num_documents: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self._documents: list[NDArray] = []
        self._collected_tokens = 0

    def add(self, batch: TokenizedDocuments) -> None:
        """Append documents in order; which shard one lands in depends on the documents before it only."""
        tokens = batch.tokens.astype(self.dtype)
        start = 0
        for length in batch.lengths.tolist():
            self._documents.append(tokens[start : start + length])
            self._collected_tokens += length
            start += length
            if self._collected_tokens >= self.shard_tokens:
                self._write_shard()

    def finish(self) -> None:
        """Write what is left as the last, shorter shard."""
        if self._documents:
            self._write_shard()

    def _write_shard(self) -> None:
        number = len(self.shard_names)
        order = np.random.default_rng([self.seed, number]).permutation(len(self._documents))
        shuffled = [self._documents[index] for index in order]
        shard_name = f"{self.name}_{number:05d}"
        write_shard(self.folder / shard_name, shuffled, self.dtype)
        self.shard_names.append(shard_name)
        self.num_documents += len(shuffled)
        self.num_tokens += self._collected_tokens
        self._documents, self._collected_tokens = [], 0


def write_shard(prefix: Path, documents: list[NDArray], dtype: np.dtype) -> None:
    """Write documents, in the order given, as PREFIX.bin and PREFIX.idx."""

    def write_tokens(file: BinaryIO) -> None:
        for document in documents:
            file.write(document.astype(dtype, copy=False).tobytes())

    write_whole(bin_path(prefix), write_tokens)
    # The index last: a shard is what has an index, so no reader ever meets one without its tokens.
    write_whole(idx_path(prefix), lambda file: write_index(file, dtype, [len(document) for document in documents]))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace a file so that, whenever the process dies, there is the old content or the new one.

    Raises:
        DataError: the file cannot be written, e.g. because the disk is full; nothing of it is left.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb", buffering=1 << 20) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error.strerror}.") from error
