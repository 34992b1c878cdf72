"""What is known about a shard beyond its bytes? `PREFIX.meta.json` beside it, and `SOURCE.manifest.json`, which lists
the shards of a source. Whoever writes shards writes both; shards of other tools have neither.

Reading a manifest costs one small file, however many shards there are: a run starts from it without looking at them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import xxhash

from nemotron_train.data.shard_format import DTYPE_CODES
from nemotron_train.errors import DataError

FORMAT = 1  # of both files
PROBE_BYTES = 1 << 16  # at each end of a `.bin`
_DTYPES = tuple(dtype.name for dtype in DTYPE_CODES.values())


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
    content = _read_facts(path)
    return None if content is None else _build(ShardMeta, content, path)


def read_manifest(path: Path) -> SourceManifest | None:
    """Read the manifest of a source; None if there is none.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    content = _read_facts(path)
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


# Read once: a manifest may list many thousand shards.
_ANNOTATIONS: dict[type, dict[str, Any]] = {
    kind: get_type_hints(kind) for kind in (ShardMeta, ManifestShard, SourceManifest)
}
_Facts = TypeVar("_Facts", ShardMeta, ManifestShard, SourceManifest)


def _build(kind: type[_Facts], content: Any, path: Path) -> _Facts:
    if not isinstance(content, Mapping):
        raise DataError(f"{path} has {content!r} in place of the facts of a shard: it is damaged.")
    kinds = _ANNOTATIONS[kind]
    missing = [name for name in kinds if name not in content]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: it is damaged, or not of this program.")
    for name, expected in kinds.items():
        if not _fits(content[name], expected):
            raise DataError(f"{path}: {name} is {content[name]!r}, which cannot be: it is damaged.")
    if "dtype" in kinds and content["dtype"] not in _DTYPES:
        raise DataError(f"{path}: dtype is {content['dtype']}, not one of {', '.join(_DTYPES)}: it is damaged.")
    return kind(**{name: content[name] for name in kinds})


def _fits(value: Any, expected: Any) -> bool:
    """Tell whether a value is of the annotated type; numbers count something, so none is below zero."""
    if isinstance(expected, UnionType):
        return any(_fits(value, kind) for kind in get_args(expected))
    if expected is int:
        return type(value) is int and value >= 0
    return isinstance(value, get_origin(expected) or expected)


def _read_facts(path: Path) -> dict[str, Any] | None:
    content = read_object(path)
    if content is not None and content.get("format") not in (None, FORMAT):
        raise DataError(f"{path}: no facts of format {FORMAT}. Was it written by another version?")
    return content


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a file that holds one JSON object; None if there is no such file.

    Raises:
        DataError: the file is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: no JSON object.")
    return content
