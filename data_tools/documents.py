"""Which documents are in these files? Plain text (one document a file), JSONL (also .gz and .zst) and Parquet, as a
stream.

Documents come in the order of the inputs, files of a folder sorted by path, so the same inputs always give the same
sequence. Nothing is held beyond one line, one text file or one Parquet batch.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as parquet
import zstandard

from nemotron_train.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"
PARQUET_BATCH_ROWS = 1024
READ_BYTES = 1 << 17


def find_files(inputs: Sequence[Path], text_suffixes: Sequence[str]) -> list[Path]:
    """List the files of documents among the inputs: files as given, folders searched for known suffixes.

    Raises:
        DataError: an input does not exist, has an unknown suffix, or is a folder without any file of documents.
    """
    suffixes = (*text_suffixes, *JSONL_SUFFIXES, PARQUET_SUFFIX)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(suffixes))
        else:
            found = [path] if path.is_file() and path.name.endswith(suffixes) else []
        if not found:
            what = "holds no such file" if path.is_dir() else "is none" if path.is_file() else "does not exist"
            raise DataError(f"{path} {what}: documents are in files that end in {', '.join(suffixes)} (--text-suffix).")
        files.extend(found)
    return files


class DocumentStream:
    """Iterates over the texts of files; `bytes_read` says how far it is in the files as they lie on disk."""

    def __init__(self, files: Sequence[Path], text_key: str) -> None:
        self.total_bytes = sum(file.stat().st_size for file in files)
        self._files = files
        self._text_key = text_key
        self._finished_bytes = 0
        self._current: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        at = self._current.tell() if self._current is not None and not self._current.closed else 0
        return self._finished_bytes + at

    def __iter__(self) -> Iterator[str]:
        for path in self._files:
            with path.open("rb") as self._current:
                yield from _reader_of(path)(path, self._current, self._text_key)
            self._finished_bytes += path.stat().st_size


def _reader_of(path: Path) -> Callable[[Path, BinaryIO, str], Iterator[str]]:
    if path.name.endswith(JSONL_SUFFIXES):
        return _read_jsonl
    return _read_parquet if path.name.endswith(PARQUET_SUFFIX) else _read_text


def _read_text(path: Path, file: BinaryIO, text_key: str) -> Iterator[str]:
    try:
        yield file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8 at byte {error.start}. Convert the file or leave it out.") from error


def _read_jsonl(path: Path, file: BinaryIO, text_key: str) -> Iterator[str]:
    number, line = 0, b""
    try:
        for line in _lines(path, file):
            number += 1
            if line.strip():
                yield _valid_text(json.loads(line)[text_key])
    except KeyError as error:
        keys = ", ".join(json.loads(line))
        raise DataError(f"{path}, line {number}: no key {text_key!r}; it has {keys} (--text-key).") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, line {number}: no JSON object with a text under {text_key!r}: {error}") from error
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise DataError(f"{path}, after line {number}: the compressed file is damaged: {error}") from error


def _lines(path: Path, file: BinaryIO) -> Iterable[bytes]:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    return _zstd_lines(file) if path.name.endswith(".zst") else file


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of one or more zstd frames. (The library's own reader takes a cut file for a whole one.)"""
    frame = zstandard.ZstdDecompressor().decompressobj()
    rest = b""
    while chunk := file.read(READ_BYTES):
        while chunk:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            yield from lines
            chunk = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("it ends within a zstd frame")
    if rest:
        yield rest


def _read_parquet(path: Path, file: BinaryIO, text_key: str) -> Iterator[str]:
    try:
        table = parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            raise DataError(f"{path}: no column {text_key!r}; it has {table.schema_arrow.names} (--text-key).")
        for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield _valid_text(text)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no readable Parquet file of texts in {text_key!r}: {error}") from error


def _valid_text(text: object) -> str:
    """Return the text with lone surrogates, which JSON can spell but no encoding has, replaced."""
    if not isinstance(text, str):
        raise TypeError(f"got {type(text).__name__} instead of a text")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
