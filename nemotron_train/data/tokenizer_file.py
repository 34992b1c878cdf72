"""What does the data core need of a Hugging Face `tokenizer.json`? Its size, the ids of a few tokens, and its hash."""

import json
from pathlib import Path
from typing import Any

import xxhash

from nemotron_train.errors import ConfigError, DataError


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Check that every id of a `tokenizer.json` is a row of the model's embedding.

    Raises:
        DataError: the file is missing or no tokenizer.
        ConfigError: it has more ids than model.vocab_size.
    """
    size = tokenizer_size(path)
    if size > vocab_size:
        raise ConfigError(f"{path} has {size} tokens, model.vocab_size={vocab_size}. Raise model.vocab_size.")


def tokenizer_size(path: Path) -> int:
    """Return the largest token id of a `tokenizer.json`, plus one."""
    return max(_ids(path).values()) + 1


def token_id(path: Path, token: str, key: str) -> int:
    """Return the id of a token.

    Args:
        key: of the configuration that names it, for the message.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    ids = _ids(path)
    if token not in ids:
        raise ConfigError(f"{path} has no token {token!r} ({key}). Name one of its tokens, or use its tokenizer.")
    return ids[token]


def tokenizer_hash(path: Path) -> str:
    """Return the xxh3-128 of the file, as shards record it."""
    return xxhash.xxh3_128(_read(path)).hexdigest()


def _ids(path: Path) -> dict[str, int]:
    try:
        content: Any = json.loads(_read(path).decode("utf-8"))
        vocab = content["model"]["vocab"]
        if not isinstance(vocab, dict):  # Unigram has a list of pieces with their scores
            vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
        ids = vocab | {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no Hugging Face tokenizer.json: {error!r}.") from error
    if not ids:
        raise DataError(f"{path} is no Hugging Face tokenizer.json: it has no tokens.")
    for token, number in ids.items():
        if type(number) is not int or number < 0:
            raise DataError(f"{path}: token {token!r} has the id {number!r}, expected a whole number, 0 or more.")
    return ids


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror} (data.path, data.tokenizer).") from error
