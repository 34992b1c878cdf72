"""Which source does the k-th sample of a phase come from, and how many came from it before? Both by a few integer
divisions, exact at any k.

The sources are the leaves of a Huffman tree over their weights. At a node whose branches weigh a and b, of the first
k samples that reach it exactly k a / (a + b), rounded half up, go left and the others right. So the count at a leaf
follows from k by one division per level, and so does the leaf that the next sample falls to.

**No source is ever 1.68 samples off its weight**, whatever the weights, however long the phase:

- A split is off by at most 1/2 sample on either side. What it is off reaches a leaf below in proportion to the leaf's
  share of that side. With w_0 the weight of the leaf, w_1 of its parent, ... up to w_d of the root's branch, the leaf
  is off by at most (1/2) (w_0/w_0 + w_0/w_1 + ... + w_0/w_d).
- Huffman joins the two lightest nodes x <= y. All that is joined later, the sibling of their parent too, weighs at
  least y: the grandparent of a node weighs at least its parent and the node together. So w_1, w_2, w_3, w_4, ... are
  more than 1, 2, 3, 5, ... times w_0 (Fibonacci's numbers, each the sum of the two before), and the leaf is off by
  less than (1/2) (1 + 1/1 + 1/2 + 1/3 + 1/5 + 1/8 + ...) = 1.67994...
- Any stretch of samples, such as one rank's share of a batch, is the difference of two prefixes: off by less than
  twice that, 3.36 samples.
"""

from collections.abc import Mapping
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import gcd, lcm
from typing import NamedTuple


class _Fork(NamedTuple):
    """An inner node; `left` and `right` are numbers of nodes."""

    left_weight: int
    weight: int  # of both branches
    left: int
    right: int


class Interleave:
    """Deals the samples of a phase to its sources by weight. Follows from names and weights, not from their order."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Grow the tree.

        Args:
            weights: of sources that are drawn at all, > 0, taken as the decimal numbers they print as (0.1 is 1/10);
                only their ratios count.
        """
        if not weights or min(weights.values()) <= 0:
            raise ValueError(f"an interleave needs weights above 0, got {dict(weights)}")
        self.weights = _as_integers(weights)
        self.names = tuple(self.weights)
        # Nodes 0 ... n-1 are the leaves in the order of `names`, n ... 2n-2 the forks; the last node is the root.
        self._forks: list[_Fork] = []
        nodes = [(weight, leaf) for leaf, weight in enumerate(self.weights.values())]
        heapify(nodes)
        while len(nodes) > 1:
            (left_weight, left), (right_weight, right) = heappop(nodes), heappop(nodes)
            heappush(nodes, (left_weight + right_weight, len(self.names) + len(self._forks)))
            self._forks.append(_Fork(left_weight, left_weight + right_weight, left, right))

    def draw(self, k: int) -> tuple[str, int]:
        """Return the source of the k-th sample, and how many of the samples 0 ... k-1 come from that source."""
        leaves = len(self.names)
        node, before = 2 * leaves - 2, k
        while node >= leaves:
            left_weight, weight, left, right = self._forks[node - leaves]
            gone_left, rest = divmod(2 * left_weight * before + weight, 2 * weight)  # the share plus 1/2, rounded down
            if rest + 2 * left_weight >= 2 * weight:  # with one sample more, the quotient is one more
                node, before = left, gone_left
            else:
                node, before = right, before - gone_left
        return self.names[node], before

    def counts_before(self, k: int) -> dict[str, int]:
        """Return how many of the samples 0 ... k-1 come from each source."""
        leaves = len(self.names)
        counts = [k] * (2 * leaves - 1)
        for number in reversed(range(len(self._forks))):  # a fork comes after its branches
            left_weight, weight, left, right = self._forks[number]
            before = counts[leaves + number]
            counts[left] = (2 * left_weight * before + weight) // (2 * weight)
            counts[right] = before - counts[left]
        return dict(zip(self.names, counts[:leaves], strict=True))


def _as_integers(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the smallest integers in the same ratios, sorted by name."""
    exact = {name: Fraction(str(weights[name])) for name in sorted(weights)}
    scale = lcm(*(weight.denominator for weight in exact.values()))
    integers = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = gcd(*integers.values())
    return {name: weight // divisor for name, weight in integers.items()}
