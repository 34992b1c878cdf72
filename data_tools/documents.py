"""Which documents are in these files? Plain text (one document a file), JSONL (also .gz and .zst) and Parquet, as a
stream.

Documents come in the order of the inputs, files of a folder sorted by path, so the same inputs always give the same
sequence. Nothing is held beyond one line, one text file or a few rows, and none of these may exceed LONGEST_BYTES: so
memory is bounded whatever the input.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow.parquet as parquet
import zstandard

from nemotron_train.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
COMPRESSED_SUFFIXES = (".jsonl.gz", ".jsonl.zst")
JSONL_SUFFIXES = (".jsonl", *COMPRESSED_SUFFIXES)
PARQUET_SUFFIX = ".parquet"
READ_BYTES = 1 << 17
LONGEST_BYTES = 1 << 25  # of a line or a text; a process needs some fifteen times as much memory for it
PARQUET_BATCH_BYTES, PARQUET_BATCH_ROWS = 1 << 23, 1024  # whichever is less


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


class Document(NamedTuple):
    text: str
    place: str  # in its file, for messages


Where = Sequence[tuple[str, str, bool]]


def read_documents(
    path: Path, text_key: str, where: Where, start: int = 0, end: int | None = None
) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
        where: (key, value, wanted): keep documents of JSONL and Parquet whose key has that value, or has not. A value
            that is no text is compared as JSON spells it: 5, 0.5, true, null.
        start, end: of a JSONL file, the bytes in which lines begin; of a Parquet file, the row groups.

    Raises:
        DataError: names the file, and the line or place where it is damaged, lacks the key or is too long; or `where`
            is asked of plain text, of which nothing else is known.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
    with file:
        if path.name.endswith(JSONL_SUFFIXES):
            yield from _read_jsonl(path, file, text_key, where, start, end)
        elif path.name.endswith(PARQUET_SUFFIX):
            yield from _read_parquet(path, file, text_key, where, start, end)
        elif where:
            raise DataError(f"{path}: plain text has no key {where[0][0]!r}. Leave the file out, or --where.")
        else:
            yield from _read_text(path, file)


def _read_text(path: Path, file: BinaryIO) -> Iterator[Document]:
    content = file.read(LONGEST_BYTES + 1)
    if len(content) > LONGEST_BYTES:
        raise _too_long(path, "the text")
    try:
        yield Document(content.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8 at byte {error.start}. Convert the file or leave it out.") from error


def _too_long(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what} has more than {LONGEST_BYTES} bytes. Cut it into several documents.")


def _read_jsonl(
    path: Path, file: BinaryIO, text_key: str, where: Where, start: int, end: int | None
) -> Iterator[Document]:
    record: Mapping[str, Any] = {}
    number, place = 0, "line 0"
    try:
        for number, (at, line) in enumerate(_lines_from(path, file, start, end), start=1):
            place = f"line {number}" if start == 0 else f"the line at byte {at}"
            if line.strip():
                record = _parse(line)
                text = record[text_key]
                if text is not None and _is_wanted(record, where):
                    yield Document(_valid_text(text), f"{path}, {place}")
    except KeyError as error:
        wanted = error.args[0]
        option = "--text-key" if wanted == text_key else "--where"
        raise DataError(f"{path}, {place}: no key {wanted!r}; it has {', '.join(record)} ({option}).") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, {place}: no JSON object with a text under {text_key!r}: {error}") from error
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise DataError(f"{path}, after line {number}: the compressed file is damaged: {error}") from error


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)  # knows lone surrogates, and says better what is wrong


def _is_wanted(record: Mapping[str, Any], where: Where) -> bool:
    return all((_spelled(record[key]) == value) is wanted for key, value, wanted in where)


def _spelled(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else str(value)


def _lines_from(path: Path, file: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in [start, end), each with its first byte (of the text as it is uncompressed)."""
    at = start
    if start:
        file.seek(start - 1)
        at -= 1
        for rest in iter(partial(file.readline, READ_BYTES), b""):  # of a line that began before
            at += len(rest)
            if rest.endswith(b"\n"):
                break
            if end is not None and at >= end:
                return
    lines = iter(_lines(path, file))
    while (end is None or at < end) and (line := next(lines, b"")):
        if len(line) > LONGEST_BYTES:
            raise _too_long(path, f"the line at byte {at}")
        yield at, line
        at += len(line)


def _lines(path: Path, file: BinaryIO) -> Iterable[bytes]:
    """Yield lines; of one that is too long, more than LONGEST_BYTES, and perhaps not all."""
    if path.name.endswith(".zst"):
        return _zstd_lines(file)
    stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file
    return iter(partial(stream.readline, LONGEST_BYTES + 1), b"")


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of one or more zstd frames. (The library's own reader takes a cut file for a whole one.)"""
    frame = zstandard.ZstdDecompressor().decompressobj()
    begun: list[bytes] = []  # pieces of a line
    while chunk := file.read(READ_BYTES):
        while chunk:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            *ends, rest = frame.decompress(chunk).split(b"\n")
            for end in ends:
                yield b"".join((*begun, end, b"\n"))
                begun.clear()
            begun.append(rest)
            if sum(map(len, begun)) > LONGEST_BYTES:
                yield b"".join(begun)
                return
            chunk = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("it ends within a zstd frame")
    if any(begun):
        yield b"".join(begun)


def _read_parquet(
    path: Path, file: BinaryIO, text_key: str, where: Where, start: int, end: int | None
) -> Iterator[Document]:
    columns = list(dict.fromkeys([text_key, *(key for key, _, _ in where)]))
    try:
        table = parquet.ParquetFile(file, buffer_size=1 << 20)  # without it a whole column of a row group is read
        for column in columns:
            if column not in table.schema_arrow.names:
                option = "--text-key" if column == text_key else "--where"
                raise DataError(f"{path}: no column {column!r}; it has {table.schema_arrow.names} ({option}).")
        groups = range(start, table.num_row_groups if end is None else end)
        row = sum(table.metadata.row_group(number).num_rows for number in range(start))
        rows = min(map(_batch_rows, map(table.metadata.row_group, groups)), default=1)
        for batch in table.iter_batches(batch_size=rows, columns=columns, row_groups=list(groups)):
            for record in batch.to_pylist():
                row += 1
                text = record[text_key]
                if text is not None and _is_wanted(record, where):
                    if len(text) > LONGEST_BYTES:
                        raise _too_long(path, f"row {row}")
                    yield Document(_valid_text(text), f"{path}, row {row}")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no readable Parquet file of texts in {text_key!r}: {error}") from error


def _batch_rows(group: parquet.RowGroupMetaData) -> int:
    """Return how many rows of a group are read at once."""
    mean = group.total_byte_size // max(1, group.num_rows)
    return max(1, min(PARQUET_BATCH_ROWS, PARQUET_BATCH_BYTES // max(1, mean)))


def _valid_text(text: object) -> str:
    """Return the text with lone surrogates, which JSON can spell but no encoding has, replaced."""
    if not isinstance(text, str):
        raise TypeError(f"got {type(text).__name__} instead of a text")
    if text.isascii():  # known without looking
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
