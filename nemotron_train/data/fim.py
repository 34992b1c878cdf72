"""How does a model learn to fill in the middle? Some documents are cut in three and rearranged, so that the middle
comes last.

    prefix first (PSM):  <prefix> prefix <suffix> suffix <middle> middle
    suffix first (SPM):  <prefix> <suffix> suffix <middle> prefix middle

Source: arXiv 2207.14255, section 3 (SPM in its second variant, which shares its start with PSM). Each part of a
document within a sample is rearranged on its own. What happens to it follows from the seed and from where it lies in
its source alone, so neither the order of reading nor a resume can change it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from nemotron_train.data.permutation import splitmix64

ROOM = 3  # tokens of a document's end that make room for the three sentinels: length and end stay where they are
SHORTEST = 10  # shorter parts of documents are left alone


@dataclass(frozen=True)
class FillInTheMiddle:
    """Rearranges documents of a window."""

    eod_id: int  # ends documents
    prefix_id: int
    suffix_id: int
    middle_id: int
    spm_rate: float  # of rearranged documents, suffix first
    seed: int

    def rearrange(self, tokens: NDArray[np.int64], source: str, start: int, rate: float) -> NDArray[np.int64]:
        """Rearrange a share of the documents in a window.

        Args:
            tokens: of the window, the label of its last token included.
            start: where the window starts in its source.
            rate: of documents that are rearranged, 0 to 1.

        Returns:
            as many tokens. Ends of documents are where they were; of a rearranged document the last three tokens are
            missing.
        """
        key = xxhash.xxh3_64_intdigest(source.encode(), self.seed & (1 << 64) - 1)
        out = tokens.copy()
        for first, end in self._documents(tokens):
            if end - first < SHORTEST:
                continue
            drawn = _Draws(key, start + first)
            if drawn.uniform() < rate:
                out[first:end] = self._cut(tokens[first:end], drawn)
        return out

    def _documents(self, tokens: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Yield first token and end of every document or part of one, without the token that ends it."""
        first = 0
        for end in np.flatnonzero(tokens == self.eod_id).tolist():
            yield first, end
            first = end + 1
        yield first, len(tokens)

    def _cut(self, document: NDArray[np.int64], drawn: "_Draws") -> NDArray[np.int64]:
        kept = document[: len(document) - ROOM]
        cuts = sorted(drawn.below(len(kept) + 1) for _ in range(2))
        prefix, middle, suffix = np.split(kept, cuts)
        parts: tuple[ArrayLike, ...]
        if drawn.uniform() < self.spm_rate:
            parts = ([self.prefix_id, self.suffix_id], suffix, [self.middle_id], prefix, middle)
        else:
            parts = ([self.prefix_id], prefix, [self.suffix_id], suffix, [self.middle_id], middle)
        return np.concatenate([np.asarray(part) for part in parts]).astype(np.int64)


@dataclass(frozen=True)
class TextCutter:
    """Cuts documents between characters, before they are tokenized: a part may then begin or end within what would have
    been a token, as it does where an editor asks for the middle."""

    rate: float  # of documents that are cut
    spm_rate: float
    seed: int

    def cut(self, text: str, key: int) -> list[tuple[str | None, str]]:
        """Return the document as pieces to be tokenized one by one, each with the sentinel before it, if any.

        Args:
            key: a number of the document's own.
        """
        drawn = _Draws(self.seed, key)
        if len(text) < SHORTEST or drawn.uniform() >= self.rate:
            return [(None, text)]
        first, end = sorted(drawn.below(len(text) + 1) for _ in range(2))
        prefix, middle, suffix = text[:first], text[first:end], text[end:]
        if drawn.uniform() < self.spm_rate:
            return [("prefix", ""), ("suffix", suffix), ("middle", prefix), (None, middle)]
        return [("prefix", prefix), ("suffix", suffix), ("middle", middle)]


class _Draws:
    """Random numbers that follow from two keys: the same wherever and whenever they are drawn."""

    def __init__(self, key: int, position: int) -> None:
        self._state = splitmix64(key ^ splitmix64(position))

    def _next(self) -> int:
        self._state = splitmix64(self._state + 0x9E3779B97F4A7C15)
        return self._state

    def uniform(self) -> float:
        """Return a number from 0 on and below 1."""
        return (self._next() >> 11) / (1 << 53)

    def below(self, bound: int) -> int:
        return self._next() * bound >> 64
