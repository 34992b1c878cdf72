"""What is known about a shard beyond its bytes? `PREFIX.meta.json` beside it, and `SOURCE.manifest.json`, which lists
the shards of a source. Whoever writes shards writes both; shards of other tools have neither.

Reading a manifest costs one small file, however many shards there are: a run starts from it without looking at them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from nemotron_train.errors import DataError

FORMAT = 1  # of both files
PROBE_BYTES = 1 << 16  # at each end of a `.bin`


@dataclass(frozen=True)
class ShardMeta:
    """Facts of one shard. Hashes are xxh3-128, in hexadecimal."""

    tokens: int
    documents: int
    dtype: str  # numpy's name, e.g. uint16
    max_id: int  # largest token id
    eod_id: int | None  # ends documents; None: documents have no such token
    eod_count: int  # tokens equal to eod_id
    eod_terminated: bool  # every document ends with eod_id, and none has it inside
    tokenizer_hash: str | None  # of the bytes of tokenizer.json; None: not known
    bin_bytes: int
    idx_bytes: int
    bin_hash: str
    idx_hash: str
    probe_hash: str  # of the first and the last PROBE_BYTES of the .bin: cheap to compare when a shard is opened
    writer: str  # name and version of the program


@dataclass(frozen=True)
class ManifestShard:
    """A shard of a source, as the manifest lists it: enough to plan a run, and to know the shard again."""

    name: str  # prefix relative to the manifest's folder
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    bin_hash: str
    idx_hash: str
    probe_hash: str


@dataclass(frozen=True)
class SourceManifest:
    source: str
    dtype: str
    max_id: int
    eod_id: int | None
    eod_terminated: bool  # of all shards
    tokenizer_hash: str | None
    writer: str
    shards: tuple[ManifestShard, ...]
    made_from: Mapping[str, Any]  # what the writer was given: settings and inputs; not read by training

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


def meta_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.meta.json")


def manifest_path(folder: Path, source: str) -> Path:
    return folder / f"{source}.manifest.json"


def meta_bytes(meta: ShardMeta) -> bytes:
    """Return the content of `PREFIX.meta.json`."""
    return (json.dumps({"format": FORMAT, **asdict(meta)}, indent=1) + "\n").encode()


def manifest_bytes(manifest: SourceManifest) -> bytes:
    """Return the content of `SOURCE.manifest.json`; the totals are there for people."""
    totals = {"format": FORMAT, "tokens": manifest.tokens, "documents": manifest.documents}
    return (json.dumps(totals | asdict(manifest), indent=1) + "\n").encode()


def read_meta(prefix: Path | str) -> ShardMeta | None:
    """Read the facts of a shard; None if nobody wrote them down.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    path = meta_path(prefix)
    content = _read_json(path)
    return None if content is None else _build(ShardMeta, content, path)


def read_manifest(path: Path) -> SourceManifest | None:
    """Read the manifest of a source; None if there is none.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    content = _read_json(path)
    if content is None:
        return None
    shards = content.get("shards")
    if not isinstance(shards, list):
        raise DataError(f"{path} has no list of shards.")
    return _build(SourceManifest, content | {"shards": tuple(_build(ManifestShard, s, path) for s in shards)}, path)


def listed(name: str, meta: ShardMeta) -> ManifestShard:
    """Return the entry of a shard in its source's manifest."""
    return _build(ManifestShard, asdict(meta) | {"name": name}, Path(name))


def probe_hash(head: bytes, tail: bytes) -> str:
    """Hash the first and the last PROBE_BYTES of a file (both the whole file where it is shorter)."""
    return xxhash.xxh3_128(head + tail).hexdigest()


_Facts = TypeVar("_Facts", ShardMeta, ManifestShard, SourceManifest)


def _build(kind: type[_Facts], content: Mapping[str, Any], path: Path) -> _Facts:
    names: Sequence[str] = [field.name for field in fields(kind)]
    missing = [name for name in names if name not in content]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: it is damaged, or not of this program.")
    return kind(**{name: content[name] for name in names})


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict) or content.get("format") not in (None, FORMAT):
        raise DataError(f"{path}: no facts of format {FORMAT}. Was it written by another version?")
    return content
