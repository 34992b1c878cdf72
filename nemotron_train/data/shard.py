"""How are tokens read from a shard? With one contiguous `pread` a request, and nothing but what is in the file."""

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemotron_train.data.shard_format import HEADER_BYTES, check_documents, read_array, read_layout
from nemotron_train.errors import DataError


class OpenFiles:
    """The open files of a set of shards: at most `limit`, least recently used closed first."""

    def __init__(self, limit: int = 512) -> None:
        self._limit = limit
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()  # a file must not be closed while another thread reads it

    def read(self, path: Path, offset: int, count_bytes: int) -> bytes:
        with self._lock:
            return os.pread(self._descriptor(path), count_bytes, offset)

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _descriptor(self, path: Path) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
            return self._descriptors[path]
        while len(self._descriptors) >= self._limit:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[path] = descriptor = os.open(path, os.O_RDONLY)
        return descriptor


class Shard:
    """One `.bin/.idx` pair whose whole index was checked when the object was made; its `.bin` is opened when read."""

    def __init__(self, prefix: Path | str, files: OpenFiles | None = None) -> None:
        """Check the shard's index.

        Args:
            prefix: path without `.bin` and `.idx`.
            files: shared among shards that are read together, so that their open files are bounded.
        """
        self.layout = read_layout(prefix)
        check_documents(self.layout)
        self._files = files if files is not None else OpenFiles()

    @property
    def path(self) -> Path:
        return self.layout.bin_path

    @property
    def dtype(self) -> np.dtype:
        return self.layout.dtype

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    @property
    def num_documents(self) -> int:
        return max(self.layout.num_boundaries - 1, 0)

    def read(self, start_token: int, count: int) -> NDArray:
        """Return `count` tokens from `start_token` on, in the shard's dtype (read-only memory).

        Raises:
            DataError: the file ends before that: it was cut after it was opened, or the range is not in the shard.
        """
        item = self.dtype.itemsize
        offset, wanted = start_token * item, count * item
        try:
            data = self._files.read(self.path, offset, wanted)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror} while reading {wanted} bytes at byte {offset}.") from error
        if len(data) != wanted:
            raise DataError(
                f"{self.path}: only {len(data)} of {wanted} bytes at byte {offset}. "
                f"The shard had {self.num_tokens} tokens when it was opened; the file was cut or replaced since."
            )
        return np.frombuffer(data, dtype=self.dtype)

    def document_ends(self) -> NDArray[np.int64]:
        """Return the token position just after each document, read from the index now and not kept."""
        layout = self.layout
        lengths = read_array(layout.idx_path, HEADER_BYTES, "<i4", layout.num_sequences)
        boundaries = read_array(layout.idx_path, layout.boundaries_offset, "<i8", layout.num_boundaries)
        ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
        return ends[boundaries[1:]]
