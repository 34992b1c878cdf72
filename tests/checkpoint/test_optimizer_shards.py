"""Boxes cover a range of elements exactly, whatever the shape and the range."""

from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.checkpoint.optimizer_shards import boxes_of_range


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(ranges())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_boxes_in_order_are_the_range(case: tuple[tuple[int, ...], int, int]) -> None:
    """Fails if an element of the range is missing, comes twice or in another order, or a box holds one outside."""
    shape, start, stop = case
    numbered = np.arange(prod(shape)).reshape(shape)
    boxes = list(boxes_of_range(start, stop, shape))
    cut = [numbered[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].ravel() for box in boxes]
    assert np.concatenate([np.arange(0), *cut]).tolist() == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
