"""In which order are the tokens of one source read? An endless sequence of positions, found by arithmetic alone.

    epoch ──▶ blocks, shuffled ──▶ rounds of them ──▶ windows of a round, shuffled ──▶ tokens

* The stream of a source is its tokens over and over; each epoch starts at another token (a keyed rotation), so cuts
  fall elsewhere every time. The endless stream is cut into blocks; a block belongs to the epoch it begins in.
* The blocks of an epoch are shuffled and read in rounds of some hundred blocks. Within a round, the windows (one
  sample's tokens) of all its blocks are shuffled.

Why not shuffle the windows of the whole epoch at once? Because the length of a sample may change in the middle of an
epoch. The windows that are left would lie scattered and could not be read as longer ones, and an order that knows of
the change beforehand would change with every new plan for the future. So a round is always finished with the windows
it began with (a longer sample then takes several of them), and the next round has windows of the new length. Every
token is used exactly once an epoch, and no position depends on what comes after it.

Blocks are large, for long samples to come from one place, and still a small part of the source, for shuffling; all of
them are powers of two times the run's first sample length, so that they hold whole windows of any permitted length.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nemotron_train.data.permutation import Permutation

BLOCK_TOKENS = 1 << 19  # at most; the longest published sample (Nemotron Nano 2's long-context phase)
BLOCKS_AN_EPOCH = 1024  # at least, in sources large enough
ROUND_BLOCKS = 1024  # at most
ROUNDS_AN_EPOCH = 8  # at least: a change of sample length waits for the end of a round


@dataclass(frozen=True)
class Span:
    """`count` tokens of a source from `start` on, wrapping at its end."""

    start: int
    count: int


@dataclass(frozen=True)
class SampleLength:
    """From `position` of the order on, samples have `tokens` tokens."""

    position: int
    tokens: int


@dataclass(frozen=True)
class _Round:
    """Blocks `first` ... `first + count - 1` in the shuffled order of an epoch."""

    epoch: int
    first: int
    count: int
    start: int  # position of its first token in the order


class SourceOrder:
    """Maps positions of the order to tokens of the source."""

    def __init__(
        self, name: str, num_tokens: int, seed: int, first_length: int, lengths: Sequence[SampleLength]
    ) -> None:
        """Args:
        first_length: tokens of the run's first sample, of whatever source.
        lengths: what lengths samples have from which positions on; rising, the first at 0. All are `first_length`
            times a power of two (`plan/run_rules.py` sees to it).
        """
        self.name, self.num_tokens, self._seed = name, num_tokens, seed
        self._block = _block_tokens(num_tokens, first_length)
        self._round_blocks = min(ROUND_BLOCKS, -(-(num_tokens // self._block) // ROUNDS_AN_EPOCH))
        self._lengths = tuple(lengths)
        self._length_positions = [length.position for length in lengths]

    def read(self, position: int, count: int) -> tuple[int, tuple[Span, ...]]:
        """Return the epoch of the first token, and where `count` tokens from `position` on lie, and the one after the
        last of them, which is its label."""
        spans: list[Span] = []
        epoch, left = -1, count
        while left:
            here = self._round_at(position)
            window, at, rest = self._window_at(position, here)
            taken = min(left, rest)
            left, position = left - taken, position + taken
            spans += self._spans(window + at, taken if left else taken + 1)
            epoch = here.epoch if epoch < 0 else epoch
        return epoch, tuple(spans)

    def _round_at(self, position: int) -> _Round:
        block = position // self._block  # how many blocks were read before
        epoch = block * self._block // self.num_tokens
        first = self._blocks_before(epoch)
        number = (block - first) // self._round_blocks * self._round_blocks
        count = min(self._round_blocks, self._blocks_before(epoch + 1) - first - number)
        return _Round(epoch, number, count, (first + number) * self._block)

    def _window_at(self, position: int, here: _Round) -> tuple[int, int, int]:
        """Return where the window at a position starts in the endless stream, how far the position is in it, and how
        many tokens can be read from there on."""
        length = self._lengths[bisect_right(self._length_positions, here.start) - 1]
        size = min(length.tokens, self._block)
        tokens = here.count * self._block
        # Samples may begin within a round's first window, after a change of length: the round is turned by as much, so
        # that one window is read in two parts, at its start and at its end, and all others whole.
        turned = (position - here.start - (length.position - here.start) % size) % tokens
        number, at = divmod(turned, size)
        shuffled = _order(self._seed, f"windows {here.first}", self.name, here.epoch, tokens // size)(number)
        in_round, part = divmod(shuffled, self._block // size)
        first = self._blocks_before(here.epoch)
        blocks = self._blocks_before(here.epoch + 1) - first
        block = first + _order(self._seed, "blocks", self.name, here.epoch, blocks)(here.first + in_round)
        return block * self._block + part * size, at, min(size - at, here.start + tokens - position)

    def _blocks_before(self, epoch: int) -> int:
        """Return how many blocks begin in the epochs before this one."""
        return -(-epoch * self.num_tokens // self._block)

    def _spans(self, start: int, count: int) -> list[Span]:
        """Return where tokens of the endless stream lie: two spans where they run over the end of an epoch."""
        spans = []
        while count:
            epoch, at = divmod(start, self.num_tokens)
            taken = min(count, self.num_tokens - at)
            origin = _origin(self._seed, self.name, epoch, self.num_tokens)
            spans.append(Span((origin + at) % self.num_tokens, taken))
            start, count = start + taken, count - taken
        return spans


def _block_tokens(num_tokens: int, first_length: int) -> int:
    """Return the largest block: `first_length` times a power of two, within both limits where there is room."""
    block = first_length
    while 2 * block <= min(BLOCK_TOKENS, num_tokens // BLOCKS_AN_EPOCH):
        block *= 2
    return block


def _key(*parts: int | str) -> int:
    """Return 64 bits that follow from the parts alone, on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


@lru_cache(maxsize=8192)
def _order(seed: int, what: str, name: str, epoch: int, size: int) -> Permutation:
    return Permutation(size, _key(seed, what, name, epoch))


@lru_cache(maxsize=8192)
def _origin(seed: int, name: str, epoch: int, tokens: int) -> int:
    """Return the token at which an epoch of a source starts."""
    return _key(seed, "origin", name, epoch) % tokens
