"""Oracles: counting one by one; the exact shares of the weights, in integers."""

from fractions import Fraction

import numpy as np
import pytest

from nemotron_train.data.interleave import Interleave

BOUND = Fraction(168, 100)  # samples a source may be off its weight
# 2.4e9 samples of 8,192 tokens are 20T tokens; beyond 2^53 = 9e15 a float could not count.
STARTS = [0, 10**7, 2_400_000_000, 10**12, 10**18]


def by_name(values: list[float]) -> dict[str, float]:
    return {f"s{number:04d}": value for number, value in enumerate(values)}


def worst_weights(depth: int) -> list[float]:
    """Return weights whose tree is a chain, where every node weighs hardly more than the two below it together."""
    node, light = 10**6, 1  # at the bottom of the chain, and what it is joined with
    weights: list[float] = [node]
    for _ in range(depth):
        weights.append(light)
        node, light = node + light, node + 1
    return weights


def many_weights() -> list[dict[str, float]]:
    """Return weights of 1 to 1000 sources: random, tied, spread over six decades, and the worst a tree can meet."""
    random = np.random.default_rng(0)
    worst = worst_weights(40)
    found = [[1.0], [1e-6, 1.0], [1.0, 1e-6, 1e-6, 3.0], [1.0] * 1000, [1.0] * 37, worst]
    for size in (2, 3, 5, 8, 21, 64, 300, 1000):
        found.append(random.exponential(size=size).tolist())
        found.append((10 ** random.uniform(-6, 0, size=size)).tolist())
        found.append(random.integers(1, 5, size=size).astype(float).tolist())
        found.append([*random.uniform(1e-6, 2e-6, size=size - 1).tolist(), 1.0])
        found.append(random.choice(worst, size=size).tolist())
    return [by_name(values) for values in found]


def most_off(interleave: Interleave, k: int, counts: dict[str, int]) -> Fraction:
    """Return how far the source that is farthest off its weight is, after k samples."""
    total = sum(interleave.weights.values())
    return Fraction(max(abs(counts[name] * total - w * k) for name, w in interleave.weights.items()), total)


@pytest.mark.parametrize("start", STARTS)
def test_rank_and_counts_are_what_counting_gives(start: int) -> None:
    """Fails if a rank is off by one: a window would be drawn twice and another never."""
    for weights in many_weights():
        interleave = Interleave(weights)
        counts = interleave.counts_before(start)
        assert sum(counts.values()) == start
        for k in range(start, start + 400):
            if k % 50 == 0:
                assert interleave.counts_before(k) == counts
            name, rank = interleave.draw(k)
            assert rank == counts[name]
            counts[name] += 1  # and no other: counts never fall, and add up to k


@pytest.mark.parametrize("start", STARTS)
def test_no_source_is_ever_off_its_weight_by_the_bound(start: int) -> None:
    """Fails if rounding drifts, rounds one way, or the tree is not the one whose bound the docstring proves.

    Every prefix of a stretch: a source is farthest ahead just after it is drawn and farthest behind just before.
    """
    for weights in many_weights():
        interleave = Interleave(weights)
        total = sum(interleave.weights.values())
        allowed = BOUND * total
        assert most_off(interleave, start, interleave.counts_before(start)) < BOUND
        for k in range(start, start + 1500):
            name, rank = interleave.draw(k)
            weight = interleave.weights[name]
            assert weight * k - rank * total < allowed
            assert (rank + 1) * total - weight * (k + 1) < allowed
        assert most_off(interleave, start + 1500, interleave.counts_before(start + 1500)) < BOUND


def test_the_bound_holds_at_random_prefixes_and_blocks() -> None:
    """Fails if some prefix up to 10^12 is off by 1.68 samples, or one rank's share of a batch by 3.36."""
    random = np.random.default_rng(1)
    for weights in many_weights():
        interleave = Interleave(weights)
        for exponent in random.uniform(0, 12, size=30):
            first, length = int(10**exponent), int(10 ** random.uniform(0, 4))
            before, after = interleave.counts_before(first), interleave.counts_before(first + length)
            assert most_off(interleave, first, before) < BOUND
            block = {name: after[name] - before[name] for name in weights}
            assert sum(block.values()) == length
            assert min(block.values()) >= 0
            assert most_off(interleave, length, block) < 2 * BOUND


def test_what_the_tree_allows_stays_below_the_bound() -> None:
    """Fails if a tree lets the errors of its splits add up further at some source than 1.68, at whatever prefix."""
    largest = Fraction(0)
    for weights in many_weights():
        interleave = Interleave(weights)
        leaf_weights = list(interleave.weights.values())
        off = [Fraction(0)] * (2 * len(weights) - 1)  # by node, in samples; none at the root
        for number in reversed(range(len(interleave._forks))):
            fork = interleave._forks[number]
            for branch, weight in ((fork.left, fork.left_weight), (fork.right, fork.weight - fork.left_weight)):
                off[branch] = off[len(weights) + number] * Fraction(weight, fork.weight) + Fraction(1, 2)
                assert branch >= len(weights) or leaf_weights[branch] == weight
        largest = max(largest, *off)
    assert Fraction(1679, 1000) < largest < BOUND  # so there is no better bound for all weights


def test_two_equal_sources_take_turns_and_a_rare_one_comes_when_due() -> None:
    """Fails if a split does not round half up: the first sample is due at half a sample."""
    assert [Interleave({"a": 1.0, "b": 1.0}).draw(k)[0] for k in range(6)] == ["a", "b"] * 3
    rare = Interleave({"often": 1.0 - 1e-6, "rare": 1e-6})
    drawn = [rare.counts_before(k)["rare"] for k in (499_999, 500_000, 1_499_999, 1_500_000, 10**12)]
    assert drawn == [0, 1, 1, 2, 10**6]
    assert rare.draw(499_999) == ("rare", 0)


def test_a_weight_however_small_gets_its_share_and_no_more() -> None:
    """Fails if a tiny weight is rounded to nothing, or up."""
    tiny = Interleave({"a": 1.0, "b": 1e-300})
    counts = [tiny.counts_before(k)["b"] for k in (10**12, 10**299, 10**300, 10**301)]
    assert counts == [0, 0, 1, 10]


def test_only_ratios_and_names_count() -> None:
    """Fails if scaling all weights, or listing the sources in another order, changed the stream."""
    first = Interleave({"a": 0.6, "b": 0.3, "c": 0.1})
    for weights in ({"c": 10, "a": 60, "b": 30}, {"b": 3e-5, "c": 1e-5, "a": 6e-5}):
        second = Interleave(weights)
        assert first.weights == second.weights == {"a": 6, "b": 3, "c": 1}
        assert [first.draw(k) for k in range(99)] == [second.draw(k) for k in range(99)]
    tied, turned = Interleave(by_name([1.0] * 9)), Interleave(dict(reversed(by_name([2.0] * 9).items())))
    assert [tied.draw(k) for k in range(99)] == [turned.draw(k) for k in range(99)]


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": -1.0}])
def test_weights_that_deal_nothing_are_refused(weights: dict[str, float]) -> None:
    """Fails if a source without a share gets a place in the tree."""
    with pytest.raises(ValueError, match="needs weights above 0"):
        Interleave(weights)
