"""How are n windows shuffled without storing an order? By a keyed bijection of 0 ... n-1 that is computed one element
at a time.

An alternating Feistel network on Z_a x Z_b, where a and b are about sqrt(n): each round adds to one half a hash of
the other, which any function can do and stay invertible. a b exceeds n by less than a; the few images that fall
outside are mapped again until they fall inside ("cycle walking"), which keeps the map a bijection.

The round function must mix high bits into low ones. Multiplying by a constant does not: the low bit of a product
depends on low bits only, and the result is a bijection that hardly shuffles. splitmix64's finalizer (Steele et al.,
OOPSLA 2014) does.
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB


def splitmix64(value: int) -> int:
    """Hash a 64-bit number to a 64-bit number, every bit of the input moving every bit of the output."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FACTOR_1) & _MASK
    value = ((value ^ (value >> 27)) * _FACTOR_2) & _MASK
    return value ^ (value >> 31)


def splitmix64_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Do what `splitmix64` does, elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTOR_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTOR_2)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A bijection of 0 ... size-1 that follows from (size, key) alone."""

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        self._a = isqrt(size - 1) + 1  # ceil(sqrt(size))
        self._b = -(-size // self._a)
        self._keys = tuple(splitmix64(key + (number + 1) * _GOLDEN) for number in range(ROUNDS))

    def __call__(self, index: int) -> int:
        """Return the image of one index."""
        a, b = self._a, self._b
        value = index
        while True:
            left, right = divmod(value, b)
            for number in range(0, ROUNDS, 2):
                left = (left + splitmix64(right ^ self._keys[number])) % a
                right = (right + splitmix64(left ^ self._keys[number + 1])) % b
            value = left * b + right
            if value < self.size:
                return value

    def image(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the images of many indices at once, the same as one by one."""
        values = np.asarray(indices).astype(np.uint64)
        walking = np.ones(len(values), dtype=bool)
        while walking.any():
            values[walking] = self._walk_array(values[walking])
            walking = values >= self.size
        return values.astype(np.int64)

    def _walk_array(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = values // b, values % b
        for number in range(0, ROUNDS, 2):
            left = (left + splitmix64_array(right ^ np.uint64(self._keys[number])) % a) % a
            right = (right + splitmix64_array(left ^ np.uint64(self._keys[number + 1])) % b) % b
        return left * b + right
