"""Oracles: the definition of a bijection; statistics of a random order, numpy's shuffle held to the same bounds."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from nemotron_train.data.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 1000, 4096, 65_537, 100_003])
def test_every_index_has_its_own_image(size: int) -> None:
    """Fails if a window would be drawn twice in an epoch, and another never."""
    assert np.sort(Permutation(size, key=7).image(np.arange(size))).tolist() == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1_000_003, 10**13])
def test_one_at_a_time_is_the_same_as_many_at_once(size: int) -> None:
    """Fails if the fast scalar path and the array path have drifted apart."""
    permutation = Permutation(size, key=2**64 - 3)
    indices = np.unique(np.random.default_rng(0).integers(0, size, 300))
    assert [permutation(int(index)) for index in indices] == permutation.image(indices).tolist()


@pytest.mark.parametrize("size", [1 << 20, 1_000_003])
@pytest.mark.parametrize("shuffle", ["ours", "numpy"])
def test_neighbours_end_up_anywhere(size: int, shuffle: str) -> None:
    """Fails if the order only looks shuffled, as with a round function whose low bits never see the high ones."""
    order = _order(shuffle, size)
    assert abs(_low_bit_flips(order) - 0.5) < 0.003
    assert abs(_pair_deviation(order, size)) < 5


def test_a_multiply_only_round_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the statistics above cannot tell a bad shuffle from a good one."""

    def multiply(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return values * np.uint64(2654435761)

    monkeypatch.setattr("nemotron_train.data.permutation.splitmix64_array", multiply)
    order = _order("ours", 1 << 20)
    assert abs(_low_bit_flips(order) - 0.5) > 0.003 or abs(_pair_deviation(order, 1 << 20)) > 5


def test_another_key_is_another_order() -> None:
    """Fails if the epochs of a source, or two seeds, shared an order."""
    orders = [Permutation(10_000, key).image(np.arange(10_000)) for key in (0, 1, 2, 1 << 32)]
    for number, first in enumerate(orders):
        for second in orders[number + 1 :]:
            assert (first == second).sum() < 10  # one place in common is what chance gives


def _order(shuffle: str, size: int) -> NDArray[np.int64]:
    orders: dict[str, Callable[[], NDArray]] = {
        "ours": lambda: Permutation(size, key=1234).image(np.arange(size)),
        "numpy": lambda: np.random.default_rng(1234).permutation(size),
    }
    return orders[shuffle]()


def _low_bit_flips(order: NDArray[np.int64]) -> float:
    """Return how often the parity of neighbours differs: 1/2 in a random order."""
    return float(((order[1:] ^ order[:-1]) & 1).mean())


def _pair_deviation(order: NDArray[np.int64], size: int) -> float:
    """Return how many standard deviations the chi-square of (this value, next value), in 32 x 32 cells, is off."""
    cell = order * 32 // size
    counts = np.bincount(cell[:-1] * 32 + cell[1:], minlength=1024)
    expected = (len(order) - 1) / 1024
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    return (chi_square - 1023) / (2 * 1023) ** 0.5
