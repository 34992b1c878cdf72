"""Oracle: every token is counted, over random lengths of samples that change at random moments."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from nemotron_train.data.source_order import SampleLength, SourceOrder, Span

FIRST = 4


def random_lengths(dice: random.Random, tokens: int) -> list[SampleLength]:
    """Draw when samples get longer or shorter, each time after a whole number of samples."""
    position, lengths = 0, [SampleLength(0, FIRST)]
    while position < tokens:
        position += dice.randint(1, 600) * lengths[-1].tokens
        lengths.append(SampleLength(position, FIRST * dice.choice([1, 2, 4, 8, 64, 1024])))
    return lengths


def read_samples(order: SourceOrder, lengths: list[SampleLength], tokens: int) -> list[tuple[int, tuple[Span, ...]]]:
    """Read sample after sample: (position, spans of the sample and the label after it)."""
    samples = []
    for length, following in zip(lengths, [*lengths[1:], None], strict=True):
        position = length.position
        end = tokens if following is None else following.position
        while position < end:
            samples.append((position, order.read(position, length.tokens)[1]))
            position += length.tokens
    return samples


def tokens_of(spans: tuple[Span, ...], size: int) -> list[int]:
    return [(span.start + i) % size for span in spans for i in range(span.count)]


@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_used_once_an_epoch_under_any_change_of_length(seed: int) -> None:
    """Fails if a change of sample length, upwards or downwards, at any moment, skips tokens or reads them twice."""
    dice = random.Random(seed)
    size = dice.choice([9001, 8192, 17_000])  # blocks of 8 or 16 tokens
    lengths = random_lengths(dice, 3 * size)
    used: Counter[int] = Counter()
    read = 0
    for _, spans in read_samples(SourceOrder("web", size, seed, FIRST, lengths), lengths, 3 * size):
        tokens = tokens_of(spans, size)[:-1]
        used.update(tokens)
        read += len(tokens)
        epochs = read // size
        if read % size < len(tokens) and epochs:
            # Blocks over the end of an epoch may be read early or late: some tokens are one use ahead or behind.
            odd = sum(used[token] not in (epochs, epochs + 1) for token in range(size))
            assert odd <= 64 + len(tokens)
    assert max(used.values()) - min(used[token] for token in range(size)) <= 2


@pytest.mark.parametrize("seed", range(3))
def test_an_epoch_of_whole_blocks_is_read_to_the_last_token(seed: int) -> None:
    """Fails if one token is lost or doubled: with whole blocks in an epoch there is nothing to excuse it."""
    dice = random.Random(seed)
    size = 16 * 1024  # blocks of 16 tokens
    lengths = random_lengths(dice, 2 * size)
    order = SourceOrder("web", size, seed, FIRST, lengths)
    stream = [t for _, spans in read_samples(order, lengths, 2 * size) for t in tokens_of(spans, size)[:-1]]
    for epoch in range(2):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_a_position_does_not_depend_on_later_lengths() -> None:
    """Fails if a change of length planned for the future, or made now, changes what was read before it."""
    size = 32_768
    plain = SourceOrder("web", size, 7, FIRST, [SampleLength(0, FIRST)])
    for change in (4, 400, 8192, 20_000):
        other = SourceOrder("web", size, 7, FIRST, [SampleLength(0, FIRST), SampleLength(change, 32)])
        for position in range(0, change, FIRST):
            assert other.read(position, FIRST) == plain.read(position, FIRST)


def test_longer_samples_come_from_one_place_once_the_round_is_over() -> None:
    """Fails if samples stay pieced together after a change of length: no long document would be read as one."""
    size, change = 1 << 20, 1000 * FIRST
    lengths = [SampleLength(0, FIRST), SampleLength(change, 256)]
    order = SourceOrder("web", size, 1, FIRST, lengths)
    samples = read_samples(order, lengths, size)[1000:]
    pieced = [position for position, spans in samples if len(spans) > 1]
    round_end = size // 8
    assert len([p for p in pieced if p > round_end]) <= 2 * 8  # one at a round's end, one at the epoch's
    assert all(len(spans) == 256 // FIRST for p, spans in samples if p < round_end - 256)


def test_neighbours_in_the_order_are_not_neighbours_in_the_source() -> None:
    """Fails if windows of a block are read one after the other: their text is related."""
    order = SourceOrder("web", 1 << 20, 1, FIRST, [SampleLength(0, FIRST)])
    starts = [order.read(position, FIRST)[1][0].start for position in range(0, 40_000, FIRST)]
    near = sum(abs(after - before) < 1024 for before, after in pairwise(starts))
    assert near < 0.04 * len(starts)  # blocks of 1024 tokens, 128 of them in a round: 1 in 128 by chance
