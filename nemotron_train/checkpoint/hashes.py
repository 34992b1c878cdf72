"""Are these the bytes that were written? xxh3-128 of files, taken while they are written and before they are read.

xxh3 finds damage, not forgery: whoever can write into a checkpoint can also write a fitting hash. What keeps a forged
file from doing harm is `safe_load.py`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class StoredFile:
    """What a file of a checkpoint must be."""

    size: int  # bytes
    hash: str  # xxh3-128, hexadecimal


class HashingWriter:
    """Writes a new file, hashing each piece in memory before it is handed to the operating system.

    A hash taken from the file afterwards would also vouch for what went wrong on the way there.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by close())
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self.failure: OSError | None = None  # torch's own writer reports a short file, and swallows why it is

    def write(self, data: Any) -> int:
        """Take bytes, or anything that holds them; all of it is written, or an OSError says why not."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        written = 0
        try:
            while written < len(view):  # the system may take a part only: of 2 GiB, or where a disk is nearly full
                written += self._file.write(view[written:]) or 0
        except OSError as error:
            self.failure = error
            raise
        self._size += written
        return written

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Do nothing, as nothing is buffered: writers of torch call it."""

    def close(self) -> StoredFile:
        """Force the file to disk; returns what it must be from now on."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return StoredFile(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close the file after an error."""
        self._file.close()


def write_file(path: Path, pieces: Sequence[bytes]) -> StoredFile:
    """Write a new file and force it to disk."""
    writer = HashingWriter(path)
    try:
        for piece in pieces:
            writer.write(piece)
    except BaseException:
        writer.abandon()
        raise
    return writer.close()


def hash_file(path: Path) -> StoredFile:
    """Hash a file that is there."""
    hashed, size = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            hashed.update(chunk)
            size += len(chunk)
    return StoredFile(size, hashed.hexdigest())


def hash_text(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
