"""Oracles: counting one by one; the exact shares of the weights; the continued fraction of the stride."""

import numpy as np
import pytest

from nemotron_train.data.interleave import CIRCLE, STRIDE, Interleave, floor_sum
from nemotron_train.errors import ConfigError


def test_floor_sum_is_the_sum_of_floors() -> None:
    """Fails if the recursion differs from adding up, for negative starts too."""
    random = np.random.default_rng(0)
    for _ in range(300):
        count, modulus, step = (int(value) for value in random.integers((0, 1, 0), (40, 50, 120)))
        start = int(random.integers(-200, 200))
        assert floor_sum(count, modulus, step, start) == sum((step * i + start) // modulus for i in range(count))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"x": 1e-6, "y": 3.0, "z": 0.25}])
def test_count_before_is_what_counting_gives(weights: dict[str, float]) -> None:
    """Fails if a rank is off by one: a window would be drawn twice and another never."""
    interleave = Interleave(weights, offset=987_654_321)
    counts = dict.fromkeys(weights, 0)
    for k in range(2000):
        assert {name: interleave.count_before(k, name) for name in weights} == counts
        counts[interleave.source_of(k)] += 1


@pytest.mark.parametrize("num_sources", [8, 64, 1000])
@pytest.mark.parametrize(("first", "bound"), [(0, 5.0), (10**7, 5.0), (2_400_000_000, 7.0)])
def test_shares_stay_close_to_the_weights_at_every_prefix(num_sources: int, first: int, bound: float) -> None:
    """Fails if a source is more than `bound` samples off its weight in the 200,000 samples after `first`.

    The deviation of a golden-ratio sequence grows with the logarithm of its length: measured at up to 5.7 samples
    after 2.4e9 (a phase of 20T tokens at 8,192), which is why the bound is wider there.
    """
    random = np.random.default_rng(num_sources)
    weights = {f"s{number:04d}": float(weight) for number, weight in enumerate(random.exponential(size=num_sources))}
    interleave = Interleave(weights, offset=int(random.integers(CIRCLE)))
    shares = np.array([weights[name] for name in interleave.names]) / sum(weights.values())
    length = 200_000
    points = (STRIDE * np.arange(first, first + length, dtype=object) + interleave._offset) % CIRCLE
    drawn = np.searchsorted(interleave._ends, points.astype(np.int64), side="right")
    assert [interleave.names[number] for number in drawn[:50]] == [interleave.source_of(first + k) for k in range(50)]
    counts = np.array([interleave.count_before(first, name) for name in interleave.names])
    deviations = []
    for number, share in enumerate(shares):
        # Between two draws of a source the deviation falls steadily: it is largest just after one, least just before.
        after = np.flatnonzero(drawn == number)
        ahead = counts[number] + np.arange(1, len(after) + 1) - share * (first + after + 1)
        behind = ahead - 1 + share
        ends = counts[number] + len(after) - share * (first + length)
        deviations += [ahead.max(initial=ends), -behind.min(initial=ends)]
    assert max(deviations) < bound


def test_no_partial_quotient_of_the_stride_is_large() -> None:
    """Fails if the stride is changed for one whose points bunch up at some scale."""
    quotients, numerator, denominator = [], STRIDE, CIRCLE
    while numerator:
        quotients.append(denominator // numerator)
        numerator, denominator = denominator % numerator, numerator
    assert denominator == 1
    assert max(quotients) <= 3


def test_only_ratios_and_names_count() -> None:
    """Fails if scaling all weights, or listing the sources in another order, changed the stream."""
    first = Interleave({"a": 1.0, "b": 2.0, "c": 5.0}, offset=5)
    second = Interleave({"c": 0.625, "a": 0.125, "b": 0.25}, offset=5)
    assert first.arcs == second.arcs
    assert [first.source_of(k) for k in range(99)] == [second.source_of(k) for k in range(99)]


def test_a_weight_that_would_vanish_is_refused() -> None:
    """Fails if a source with a weight above 0 is silently never drawn."""
    with pytest.raises(ConfigError, match="source 'b' is too small"):
        Interleave({"a": 1.0, "b": 1e-14}, offset=0)
