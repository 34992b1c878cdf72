"""Which source does the k-th sample of a phase come from, and how many came from it before? Both in closed form.

Step k visits the point u_k = (STRIDE k + offset) mod 2^40 of a circle that the sources divide in proportion to
their weights. With a stride of about 2^40 / golden ratio the points spread as evenly as points can, for every
prefix and every arc at once: each source stays within 5 samples of its weight early in a phase. The deviation grows
with the logarithm of the phase's length, to a measured 5.7 samples after 2.4e9. The number of earlier points in an arc
is a difference of two sums of floors, which a Euclid-like recursion adds up in about 20 steps, so nothing is counted
and nothing stored.
"""

from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate

from nemotron_train.errors import ConfigError

CIRCLE = 1 << 40
# Odd, so every point is visited once in 2^40 samples. Unlike the integer nearest to 2^40 / golden ratio (whose
# continued fraction has a 30 in it) STRIDE / CIRCLE has no partial quotient above 3: even beyond 2^20 samples, too.
STRIDE = 679_535_549_441


def floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """Return the sum over i = 0 ... count-1 of floor((step i + start) / modulus), for any start and step >= 0."""
    total = 0
    shift, start = divmod(start, modulus)  # also makes a negative start positive
    total += shift * count
    while True:
        quotient, step = divmod(step, modulus)
        total += quotient * (count * (count - 1) // 2)
        quotient, start = divmod(start, modulus)
        total += quotient * count
        last = step * count + start
        if last < modulus:
            return total
        # Swap the roles of the axes: count lattice points under the line column by column instead of row by row.
        count, start = divmod(last, modulus)
        step, modulus = modulus, step


class Interleave:
    """Deals the samples of a phase to its sources by weight. Follows from (weights, offset), not from their order."""

    def __init__(self, weights: Mapping[str, float], offset: int) -> None:
        """Divide the circle.

        Args:
            weights: of sources that are drawn at all, > 0; only their ratios count.
            offset: where on the circle the first sample lies.
        """
        self.names = tuple(sorted(weights))
        self._offset = offset % CIRCLE
        exact = [Fraction(weights[name]) for name in self.names]  # exact: the same arcs on every machine
        total = sum(exact)
        self._ends = tuple(round(end * CIRCLE / total) for end in accumulate(exact))
        self.arcs = dict(zip(self.names, zip((0, *self._ends[:-1]), self._ends, strict=True), strict=True))
        for name, (low, high) in self.arcs.items():
            if low == high:
                raise ConfigError(f"Weight {weights[name]} of source {name!r} is too small beside the others.")

    def source_of(self, k: int) -> str:
        """Return the source of the k-th sample."""
        return self.names[bisect_right(self._ends, (STRIDE * k + self._offset) % CIRCLE)]

    def count_before(self, k: int, name: str) -> int:
        """Return how many of the samples 0 ... k-1 come from a source."""
        low, high = self.arcs[name]
        # floor((x - low) / C) - floor((x - high) / C) is 1 where low <= x mod C < high, else 0
        return floor_sum(k, CIRCLE, STRIDE, self._offset - low) - floor_sum(k, CIRCLE, STRIDE, self._offset - high)
