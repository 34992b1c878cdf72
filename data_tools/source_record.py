"""Are the shards of a source already there, and made from the same text with the same settings? What was asked for is
written down before work begins, and again in the manifest when all shards are there.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_tools.documents import TEXT_SUFFIXES
from data_tools.shard_writer import write_whole, writer_name
from nemotron_train.data.shard_format import read_layout
from nemotron_train.data.shard_meta import (
    PROBE_BYTES,
    ShardMeta,
    SourceManifest,
    listed,
    manifest_bytes,
    manifest_path,
    probe_hash,
    read_manifest,
    read_object,
)
from nemotron_train.data.tokenizer_file import tokenizer_hash
from nemotron_train.errors import DataError

FORMAT = 3  # raise it when the same text and settings would give other shards
WHOLLY_HASHED_BYTES = 1 << 30  # of input; of more, the ends of its files: every job, and every task of an array, looks
DEFAULT_SHARD_TOKENS = 1 << 26  # 128 or 256 MiB


@dataclass(frozen=True)
class TokenizeSettings:
    """What the shards follow from, besides the text; and the engine, which they do not follow from."""

    source: str
    tokenizer: Path
    text_key: str = "text"
    eod_token: str = "<|endoftext|>"
    parse_special_tokens: bool = False
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    num_shards: int | None = None  # not asked: about `shard_tokens` in each, by the size of the input
    seed: int = 0
    text_suffixes: tuple[str, ...] = TEXT_SUFFIXES
    fim_rate: float = 0.0  # of documents that are cut in three between characters and rearranged
    fim_spm_rate: float = 0.5
    fim_tokens: tuple[str, ...] = ()  # before prefix, suffix and middle
    where: tuple[tuple[str, str, bool], ...] = ()
    engine: str = "auto"


@dataclass(frozen=True)
class TokenizedSource:
    """What `tokenize` made."""

    shards: list[str]
    documents: int
    tokens: int
    reused: bool  # all of it was there already


class SourceRecord:
    """What the shards of a source are to be made from, against what was written down about those that are there."""

    def __init__(self, output: Path, settings: TokenizeSettings, files: Sequence[Path]) -> None:
        self.output, self.source = output, settings.source
        self.work = output / f".{settings.source}.work"
        self.manifest = manifest_path(output, settings.source)
        self._begun = self.work / "made_from.json"
        # Content counts, not where it lies: paths and dates change when a folder is copied. Of large inputs the sizes
        # and both ends of the files: reading all of a crawl twice would cost as much as tokenizing it.
        sizes = [file.stat().st_size for file in files]
        whole = sum(sizes) <= WHOLLY_HASHED_BYTES
        made_from = {key: value for key, value in asdict(settings).items() if key != "engine"} | {
            "format": FORMAT,
            "tokenizer": tokenizer_hash(settings.tokenizer),
            "inputs": [
                {"name": file.name, "bytes": size, "xxh3_128": _hash(file, size, whole=whole)}
                for file, size in zip(files, sizes, strict=True)
            ],
        }
        self._made_from: dict[str, Any] = json.loads(json.dumps(made_from))  # as it reads back: tuples are lists

    def find_finished(self) -> TokenizedSource | None:
        """Return what is there if it is complete and the same; None if nothing is, or an interrupted run of the same.

        Raises:
            DataError: there are other shards of this name, or a shard of the finished source is missing or damaged.
        """
        manifest = read_manifest(self.manifest)
        if manifest is not None:
            self._refuse_others(self.manifest, manifest.made_from)
            for shard in manifest.shards:
                found = read_layout(self.output / shard.name).num_tokens
                if found != shard.tokens:
                    raise DataError(f"{self.manifest}: records {shard.tokens} tokens in {shard.name}, it has {found}.")
            names = [shard.name for shard in manifest.shards]
            return TokenizedSource(names, manifest.documents, manifest.tokens, reused=True)
        begun = read_object(self._begun)
        if begun is not None:
            self._refuse_others(self._begun, begun)
            return None
        strangers = numbered_shards(self.output, self.source)
        if strangers:
            raise DataError(
                f"{strangers[0]}.idx exists, but not {self.manifest.name}, which would say what it is. {_ADVICE}"
            )
        return None

    def write_begun(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self._made_from).encode()
        write_whole(self._begun, lambda file: file.write(content))

    def write_manifest(self, shards: Sequence[tuple[str, ShardMeta]]) -> TokenizedSource:
        """Say that all shards are there."""
        first = shards[0][1]
        manifest = SourceManifest(
            source=self.source,
            dtype=first.dtype,
            max_id=max(meta.max_id for _, meta in shards),
            eod_id=first.eod_id,
            eod_terminated=all(meta.eod_terminated for _, meta in shards),
            tokenizer_hash=first.tokenizer_hash,
            writer=writer_name(),
            shards=tuple(listed(name, meta) for name, meta in shards),
            made_from=self._made_from,
        )
        write_whole(self.manifest, lambda file: file.write(manifest_bytes(manifest)), self.work)
        names = [name for name, _ in shards]
        return TokenizedSource(names, manifest.documents, manifest.tokens, reused=False)

    def _refuse_others(self, path: Path, made_from: Mapping[str, Any]) -> None:
        differing = [key for key, value in self._made_from.items() if made_from.get(key) != value]
        if differing:
            raise DataError(f"{path}: these shards were made with other {', '.join(differing)}. {_ADVICE}")


_ADVICE = "Choose another --output or --source, or delete them."


def numbered_shards(folder: Path, source: str) -> list[Path]:
    """Return the prefixes NAME_00000, NAME_00001, ... of a source; NAME_2024_00000 is a shard of another one."""
    of_source = re.compile(re.escape(source) + "_[0-9]+")
    prefixes = (index.with_suffix("") for index in folder.glob("*.idx"))
    return sorted(prefix for prefix in prefixes if of_source.fullmatch(prefix.name))


def _hash(path: Path, size: int, *, whole: bool) -> str:
    """Hash a file, or both its ends."""
    try:
        with path.open("rb") as file:
            if not whole:
                head = file.read(PROBE_BYTES)
                file.seek(max(0, size - PROBE_BYTES))
                return probe_hash(head, file.read())
            digest = xxhash.xxh3_128()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
