"""Are the shards of a source already there, and made from the same text with the same settings? `NAME.json` beside
them tells.

It is written twice: when tokenizing begins, so that shards of an interrupted run can be told from anybody else's,
and when all shards are there.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_tools.documents import TEXT_SUFFIXES
from data_tools.shard_writer import write_whole
from nemotron_train.data.shard_format import read_layout
from nemotron_train.errors import DataError

FORMAT = 1  # raise it when the same text and settings would give other shards
DEFAULT_SHARD_TOKENS = 1 << 28  # 0.5 or 1 GiB, about what the writing process holds in memory


@dataclass(frozen=True)
class TokenizeSettings:
    """What the shards follow from, besides the text."""

    source: str
    tokenizer: Path
    text_key: str = "text"
    eod_token: str = "<|endoftext|>"
    parse_special_tokens: bool = False
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    seed: int = 0
    text_suffixes: tuple[str, ...] = TEXT_SUFFIXES


@dataclass(frozen=True)
class TokenizedSource:
    """What `tokenize` made."""

    shards: list[str]
    documents: int
    tokens: int
    reused: bool  # all of it was there already


class SourceRecord:
    """What the shards of a source are to be made from, against what `NAME.json` says they were made from."""

    def __init__(self, output: Path, settings: TokenizeSettings, files: Sequence[Path]) -> None:
        self._output = output
        self._source = settings.source
        self._path = output / f"{settings.source}.json"
        # Content counts, not where it lies: paths and dates change when a folder is copied.
        made_from = asdict(settings) | {
            "format": FORMAT,
            "tokenizer": _hash(settings.tokenizer),
            "inputs": [{"name": file.name, "xxh3_128": _hash(file)} for file in files],
        }
        self._made_from = json.loads(json.dumps(made_from))  # as it reads back: tuples are lists

    def find_finished(self) -> TokenizedSource | None:
        """Return what is there if it is complete and the same; None if nothing is, or an interrupted run of the same.

        Raises:
            DataError: there are other shards of this name, or a shard of the finished source is missing or damaged.
        """
        if not self._path.exists():
            strangers = sorted(self._output.glob(f"{self._source}_[0-9]*.idx"))
            if strangers:
                raise DataError(
                    f"{strangers[0]} exists, but not {self._path.name}, which would say what it is. {_ADVICE}"
                )
            return None
        record = self._read()
        differing = [key for key, value in self._made_from.items() if record["made_from"].get(key) != value]
        if differing:
            raise DataError(f"{self._path}: these shards were made with other {', '.join(differing)}. {_ADVICE}")
        if not record["complete"]:
            return None
        result = TokenizedSource(record["shards"], record["documents"], record["tokens"], reused=True)
        found = sum(read_layout(self._output / shard).num_tokens for shard in result.shards)
        if found != result.tokens:
            raise DataError(f"{self._path}: records {result.tokens} tokens, the shards hold {found}. {_ADVICE}")
        return result

    def write_begun(self) -> None:
        self._write({"complete": False})

    def write_finished(self, result: TokenizedSource) -> None:
        totals = {"shards": result.shards, "documents": result.documents, "tokens": result.tokens}
        self._write({"complete": True, **totals})

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content | {"made_from": self._made_from}, indent=1) + "\n"
        write_whole(self._path, lambda file: file.write(text.encode()))

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            needed = ("shards", "documents", "tokens") if record["complete"] else ()
            return {key: record[key] for key in ("made_from", "complete", *needed)}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._path} is no record of tokenized shards: {error!r}. {_ADVICE}") from error


_ADVICE = "Choose another --output or --source, or delete them."


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
    return digest.hexdigest()
