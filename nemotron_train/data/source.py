"""What is a source? Its shards, one after the other, as one endless stream of token ids that starts again after the
last."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron_train.data.shard import Shard
from nemotron_train.errors import DataError


class Source:
    """Shards of one dtype under one name. Every token it returns was in a file and is a row of the embedding."""

    def __init__(self, name: str, shards: Sequence[Shard], vocab_size: int) -> None:
        """Args:
        shards: none of a source that is only evaluated on.
        """
        self.name = name
        self.vocab_size = vocab_size
        self._shards = tuple(shards)
        self._ends = list(accumulate(shard.num_tokens for shard in shards))
        if shards:
            self._check_dtypes()

    @property
    def num_tokens(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self._shards

    @property
    def identity(self) -> str | None:
        """Return a hash of all tokens, from what the manifest says of them; None if a shard is in no manifest."""
        hashes = [shard.content_hash for shard in self._shards]
        if None in hashes:
            return None
        return xxhash.xxh3_128(json.dumps(hashes).encode()).hexdigest()

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return `count` tokens from position `start` on; the end of the stream is followed by its beginning.

        Args:
            start: 0 <= start < num_tokens.

        Raises:
            DataError: a file is shorter than its index said, or holds a token outside 0 ... vocab_size - 1.
        """
        tokens = np.empty(count, dtype=np.int64)
        filled = 0
        for shard, at, length in self.locate(start, count):
            piece = shard.read(at, length)
            self._check_vocabulary(shard, at, piece)
            tokens[filled : filled + length] = piece
            filled += length
        return tokens

    def locate(self, start: int, count: int) -> Iterator[tuple[Shard, int, int]]:
        """Yield where `count` tokens from position `start` on lie: shard, first token there, and how many."""
        while count:
            number = bisect_right(self._ends, start)  # skips empty shards
            at = start - (self._ends[number - 1] if number else 0)
            length = min(count, self._shards[number].num_tokens - at)
            yield self._shards[number], at, length
            start, count = (start + length) % self.num_tokens, count - length

    def _check_dtypes(self) -> None:
        first = self._shards[0]
        if first.dtype.kind not in "iu":
            raise DataError(f"{first.path}: tokens of source {self.name!r} are {first.dtype}, not whole numbers.")
        for shard in self._shards:
            if shard.dtype != first.dtype:
                raise DataError(
                    f"Source {self.name!r} mixes dtypes: {first.dtype} in {first.path}, {shard.dtype} in {shard.path}. "
                    "Tokenize them alike, or make them two sources."
                )
        if self.num_tokens == 0:
            raise DataError(f"Source {self.name!r} has {len(self._shards)} shards but no token.")

    def _check_vocabulary(self, shard: Shard, at: int, piece: NDArray) -> None:
        if piece.min() >= 0 and piece.max() < self.vocab_size:
            return
        wrong = int(np.flatnonzero((piece < 0) | (piece >= self.vocab_size))[0])
        raise DataError(
            f"Source {self.name!r}: {shard.path} has token {piece[wrong]} at token {at + wrong} "
            f"(byte {(at + wrong) * shard.dtype.itemsize}); the model knows 0 ... {self.vocab_size - 1}. "
            "The shard is damaged or was made with another tokenizer (model.vocab_size, data.tokenizer)."
        )
