"""How are tokens read from a shard? With one contiguous `pread` a request, and nothing but what is in the file."""

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron_train.data.shard_format import (
    HEADER_BYTES,
    ShardLayout,
    bin_path,
    check_documents,
    idx_path,
    read_array,
    read_layout,
)
from nemotron_train.data.shard_meta import PROBE_BYTES, ManifestShard, probe_hash
from nemotron_train.errors import DataError

# Larger indices are compared by size only when a shard is opened (`data_tools verify` reads them all): training does
# not read them, and on thousands of ranks reading them would cost more than the tokens.
COMPARED_INDEX_BYTES = 1 << 24


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
    """One `.bin/.idx` pair. A shard that a manifest lists is not touched before it is read or checked, and then
    compared with what the manifest says; of any other the whole index is checked at once."""

    def __init__(
        self,
        prefix: Path | str,
        files: OpenFiles | None = None,
        *,
        facts: ManifestShard | None = None,
        dtype: np.dtype | None = None,
    ) -> None:
        """Args:
        prefix: path without `.bin` and `.idx`.
        files: shared among shards that are read together, so that their open files are bounded.
        facts: of the manifest; with them `dtype`, of the manifest too.
        """
        self._prefix, self._facts = Path(prefix), facts
        self._files = files if files is not None else OpenFiles()
        self.path = bin_path(prefix)
        self._layout: ShardLayout | None = None
        if facts is not None and dtype is not None:
            self.num_tokens, self.dtype = facts.tokens, dtype
        else:
            self.num_tokens, self.dtype = self.layout.num_tokens, self.layout.dtype

    @property
    def content_hash(self) -> str | None:
        """Return the hash of its tokens that its manifest holds; None without a manifest."""
        return None if self._facts is None else self._facts.bin_hash

    @property
    def layout(self) -> ShardLayout:
        """Where everything lies; the files are checked when this is asked for the first time.

        Raises:
            DataError: they are damaged, or not those of the manifest.
        """
        if self._layout is None:
            layout = read_layout(self._prefix)
            if self._facts is None:
                check_documents(layout)
            else:
                self._compare(layout, self._facts)
            self._layout = layout
        return self._layout

    def read(self, start_token: int, count: int) -> NDArray:
        """Return `count` tokens from `start_token` on, in the shard's dtype (read-only memory).

        Raises:
            DataError: the file ends before that: it was cut after it was opened, or the range is not in the shard.
        """
        if self._layout is None:
            _ = self.layout  # checks the files
        item = self.dtype.itemsize
        offset, wanted = start_token * item, count * item
        data = self._read_bytes(offset, wanted)
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

    def _read_bytes(self, offset: int, count: int) -> bytes:
        try:
            return self._files.read(self.path, offset, count)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror} while reading {count} bytes at byte {offset}.") from error

    def _compare(self, layout: ShardLayout, facts: ManifestShard) -> None:
        index, size = idx_path(self._prefix), layout.num_tokens * layout.dtype.itemsize
        idx_bytes = index.stat().st_size
        for path, what, found, listed in (
            (self.path, "tokens", layout.num_tokens, facts.tokens),
            (self.path, "bytes", size, facts.bin_bytes),
            (index, "bytes", idx_bytes, facts.idx_bytes),
            (index, "dtype", layout.dtype.name, self.dtype.name),
        ):
            if found != listed:
                raise DataError(f"{path}: {what} {found}, its manifest says {listed}. {_REPLACED}")
        ends = (self._read_bytes(at, min(PROBE_BYTES, size)) for at in (0, max(0, size - PROBE_BYTES)))
        if probe_hash(*ends) != facts.probe_hash:
            raise DataError(
                f"{self.path}: its first or last {PROBE_BYTES} bytes (from byte 0 or {max(0, size - PROBE_BYTES)} on) "
                f"are not those of its manifest. {_REPLACED}"
            )
        if idx_bytes <= COMPARED_INDEX_BYTES and xxhash.xxh3_128(index.read_bytes()).hexdigest() != facts.idx_hash:
            check_documents(layout)  # finds most damage, and says where it is
            raise DataError(f"{index}: not the index of its manifest (bytes 0 to {idx_bytes} differ). {_REPLACED}")


_REPLACED = "The shard was damaged or replaced; restore it, or tokenize the source anew."
