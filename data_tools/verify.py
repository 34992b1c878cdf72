"""Is every byte of these shards what it should be? Reads all of them, on all cores, and reports all that is wrong."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash
from rich.console import Console
from rich.progress import track

from data_tools.console import plain_console
from data_tools.encoders import tokenizer_file
from data_tools.executors import run_all
from data_tools.source_record import numbered_shards
from nemotron_train.data.shard import Shard
from nemotron_train.data.shard_format import ShardLayout, bin_path, check_documents, idx_path, read_layout
from nemotron_train.data.shard_meta import ManifestShard, ShardMeta, read_manifest, read_meta
from nemotron_train.data.tokenizer_file import tokenizer_hash, tokenizer_size
from nemotron_train.errors import DataError, NemotronTrainError

_Result = TypeVar("_Result")

BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Expected:
    """What is known besides the shard and its own facts."""

    tokenizer_hash: str | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Report:
    prefix: Path
    problems: list[str]
    unchecked: list[str]
    tokens: int


def verify_shard(expected: Expected, entry: tuple[Path, ManifestShard | None]) -> Report:
    """Check one shard; `entry` is its prefix and what a manifest says of it."""
    prefix, listed = entry
    problems: list[str] = []
    unchecked: list[str] = []
    meta = _try(problems, read_meta, prefix)
    layout = _try(problems, read_layout, prefix)
    if layout is None:
        return Report(prefix, problems, unchecked, 0)
    before = len(problems)
    _try(problems, check_documents, layout)
    index_is_good = len(problems) == before
    problems += _compare(prefix, layout, meta, listed, expected)
    found, wrong = _scan(layout, meta, expected.vocab_size, with_ends=index_is_good)
    problems += wrong
    facts = meta if meta is not None else listed
    if facts is not None and found != facts.bin_hash:
        problems.append(
            f"{layout.bin_path}: bytes 0 to {layout.num_tokens * layout.dtype.itemsize} have the hash {found}, "
            f"{_name(facts, prefix)} says {facts.bin_hash}: damaged or replaced."
        )
    if meta is None:
        missing = "tokenizer or ends of documents" if listed else "hashes, tokenizer or ends of documents"
        unchecked.append(f"{prefix}: no .meta.json, so no {missing}")
    return Report(prefix, problems, unchecked, layout.num_tokens)


def _name(facts: ShardMeta | ManifestShard, prefix: Path) -> str:
    return f"{prefix.name}.meta.json" if isinstance(facts, ShardMeta) else "its manifest"


def _try(problems: list[str], read: Callable[..., _Result], *arguments: object) -> _Result | None:
    """Return what is read, or None and one problem more."""
    try:
        return read(*arguments)
    except (NemotronTrainError, OSError) as error:
        problems.append(str(error))
        return None


def _compare(
    prefix: Path, layout: ShardLayout, meta: ShardMeta | None, listed: ManifestShard | None, expected: Expected
) -> Iterator[str]:
    facts = meta if meta is not None else listed
    if facts is not None:
        found = {
            "tokens": layout.num_tokens,
            "documents": layout.num_boundaries - 1,
            "dtype": layout.dtype.name,
            "bin_bytes": bin_path(prefix).stat().st_size,
            "idx_bytes": idx_path(prefix).stat().st_size,
            "idx_hash": _file_hash(idx_path(prefix)),
        }
        for key, value in found.items():
            if value != getattr(facts, key, value):  # a manifest has the dtype of all shards only
                yield f"{idx_path(prefix)}: {key} is {value}, {_name(facts, prefix)} says {getattr(facts, key)}."
    if meta is not None and expected.tokenizer_hash not in (None, meta.tokenizer_hash):
        yield f"{prefix}: made with tokenizer {meta.tokenizer_hash}, not {expected.tokenizer_hash} (--tokenizer)."
    if listed is not None and meta is not None:
        for field in fields(ManifestShard):
            if field.name != "name" and getattr(listed, field.name) != getattr(meta, field.name):
                yield (
                    f"{prefix}: {field.name} is {getattr(meta, field.name)}, its manifest says "
                    f"{getattr(listed, field.name)}: the shard was replaced."
                )


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _scan(
    layout: ShardLayout, meta: ShardMeta | None, vocab_size: int | None, *, with_ends: bool
) -> tuple[str, list[str]]:
    """Read all tokens; return their hash, and what is wrong with their range and, if the index is good, with the ends
    of documents."""
    problems: list[str] = []
    digest, at, item = xxhash.xxh3_128(), 0, layout.dtype.itemsize
    limit = vocab_size if vocab_size is not None else None if meta is None else meta.max_id + 1
    eod = meta.eod_id if meta is not None and meta.eod_terminated and with_ends else None
    ends = Shard(layout.prefix).document_ends() - 1 if eod is not None else np.zeros(0, np.int64)
    eod_is_wrong = False
    with layout.bin_path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            tokens = np.frombuffer(block, dtype=layout.dtype)
            is_wrong = (tokens < 0) | (tokens >= limit) if limit is not None else np.zeros(0, bool)
            if is_wrong.any():
                wrong = np.flatnonzero(is_wrong)
                first = at + int(wrong[0])
                problems.append(
                    f"{layout.bin_path}: token {tokens[wrong[0]]} at byte {first * item} is not one of 0 ... "
                    f"{(limit or 1) - 1} (and {len(wrong) - 1} more of them nearby)."
                )
            if eod is not None and not eod_is_wrong:
                found = np.flatnonzero(tokens == eod) + at
                wanted = ends[np.searchsorted(ends, at) : np.searchsorted(ends, at + len(tokens))]
                differing = np.setxor1d(found, wanted)
                if len(differing):
                    eod_is_wrong = True
                    problems.append(
                        f"{layout.bin_path}: documents should end with token {eod}, and only they; not so at byte "
                        f"{int(differing[0]) * item}."
                    )
            at += len(tokens)
    return digest.hexdigest(), problems


def find_shards(paths: Sequence[Path]) -> tuple[list[tuple[Path, ManifestShard | None]], list[str]]:
    """List the shards of prefixes, folders and manifests, and what is wrong with the lists themselves."""
    entries: dict[Path, ManifestShard | None] = {}
    problems: list[str] = []
    for path in paths:
        manifests = [path] if path.name.endswith(".manifest.json") else sorted(path.rglob("*.manifest.json"))
        for file in manifests:
            manifest = _try(problems, read_manifest, file)
            if manifest is None:
                problems += [] if file.exists() else [f"{file} does not exist."]
                continue
            for shard in manifest.shards:
                prefix = file.parent / shard.name
                if idx_path(prefix).exists():
                    entries[prefix] = shard
                else:
                    problems.append(f"{idx_path(prefix)} is missing; {file.name} lists it.")
            extras = [prefix for prefix in numbered_shards(file.parent, manifest.source) if prefix not in entries]
            problems += [f"{extra}.idx is not in {file.name}." for extra in extras]
        if path.is_dir():
            for index in sorted(path.rglob("*.idx")):
                entries.setdefault(Path(str(index)[: -len(".idx")]))
        elif not manifests:
            entries.setdefault(path)
    return list(entries.items()), problems


def run(arguments: argparse.Namespace) -> None:
    console = plain_console(stderr=True)
    tokenizer = tokenizer_file(arguments.tokenizer) if arguments.tokenizer else None
    expected = Expected(
        tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer else None,
        vocab_size=arguments.vocab_size or (tokenizer_size(tokenizer) if tokenizer else None),
    )
    entries, problems = find_shards(arguments.path)
    reports = list(
        track(
            run_all(partial(verify_shard, expected), entries, "local", arguments.workers),
            description="verify",
            total=len(entries),
            console=Console(stderr=True),
        )
    )
    reports.sort(key=lambda report: report.prefix)
    problems += [problem for report in reports for problem in report.problems]
    for line in [*problems, *(f"not checked: {line}" for report in reports for line in report.unchecked)]:
        console.print(line)
    tokens = sum(report.tokens for report in reports)
    if problems:
        raise DataError(f"{len(problems)} problems in {len(entries)} shards of {tokens} tokens.")
    if not entries:
        raise DataError("No shards there: name prefixes, folders or manifests.")
    console.print(f"{len(entries)} shards of {tokens} tokens are in order.")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, nargs="+", help="prefixes, folders or NAME.manifest.json")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="the tokenizer they should be made with")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens should be below it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
