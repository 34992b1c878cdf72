"""How is the input cut into parts that are tokenized independently, and what do their documents say?

A part is a few text files, a byte range of a JSONL file, a whole compressed file, or some row groups of a Parquet file.
Parts follow from the files alone, so any number of processes share the same work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as parquet

from data_tools.documents import COMPRESSED_SUFFIXES, PARQUET_SUFFIX, Document, read_documents
from nemotron_train.errors import DataError

PART_BYTES = 1 << 26
FILES_A_PART = 4096


@dataclass(frozen=True)
class Part:
    """Documents that begin in `[start, end)` of the files: bytes of a JSONL file, row groups of a Parquet file."""

    number: int
    files: tuple[Path, ...]
    num_bytes: int  # on disk; of Parquet, uncompressed
    start: int = 0
    end: int | None = None  # None: to the end of the files

    def documents(self, text_key: str, where: Sequence[tuple[str, str, bool]]) -> Iterator[Document]:
        """Read the part's documents in order.

        Args:
            where: (key, value, wanted): keep documents whose key has that value, or has not.
        """
        for file in self.files:
            yield from read_documents(file, text_key, where, self.start, self.end)


def plan_parts(files: Sequence[Path], part_bytes: int = PART_BYTES) -> list[Part]:
    """Cut the files, in their order."""
    parts: list[Part] = []
    texts: list[Path] = []
    text_bytes = 0

    def add(files: tuple[Path, ...], num_bytes: int, start: int = 0, end: int | None = None) -> None:
        parts.append(Part(len(parts), files, num_bytes, start, end))

    def flush_texts() -> None:
        nonlocal text_bytes
        if texts:
            add(tuple(texts), text_bytes)
            texts.clear()
            text_bytes = 0

    for file in files:
        size = file.stat().st_size
        if file.name.endswith(".jsonl"):
            flush_texts()
            for start in range(0, max(size, 1), part_bytes):
                add((file,), min(part_bytes, size - start), start, start + part_bytes)
        elif file.name.endswith(PARQUET_SUFFIX):
            flush_texts()
            for start, end, num_bytes in _row_groups(file, part_bytes):
                add((file,), num_bytes, start, end)
        elif file.name.endswith(COMPRESSED_SUFFIXES):
            flush_texts()
            add((file,), size)
        else:
            texts.append(file)
            text_bytes += size
            if len(texts) == FILES_A_PART or text_bytes >= part_bytes:
                flush_texts()
    flush_texts()
    return parts


def _row_groups(file: Path, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield first and end of successive row groups, and their bytes."""
    try:
        metadata = parquet.ParquetFile(file).metadata
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: no readable Parquet file: {error}") from error
    start, total = 0, 0
    for number, size in enumerate(sizes):
        total += size
        if total >= part_bytes or number + 1 == len(sizes):
            yield start, number + 1, total
            start, total = number + 1, 0
