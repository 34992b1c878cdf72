"""Runs each layer in the precision that the plan gives it, through the context its linear layers read."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


def _nothing(group: Any) -> AbstractContextManager:
    return nullcontext()


def _as_asked() -> AbstractContextManager:
    return nullcontext()


@dataclass(frozen=True)
class LayerPrecision:
    """Where FP8 begins and ends.

    Scaling that looks only at the tensor at hand is entered layer by layer, so that some layers can stay out. Delayed
    scaling updates its history when the outermost context ends: it is entered once, for the whole stack.
    """

    fp8_layers: range = range(0)
    whole_stack: bool = False
    enter_fp8: Callable[[Any], AbstractContextManager] = _nothing  # takes the group over which maxima are reduced
    fp8_weights: Callable[[], AbstractContextManager] = _as_asked  # linear layers built inside hold only FP8 weights

    def stack(self, group: Any) -> AbstractContextManager:
        """Enter around all layers of a chunk."""
        return self.enter_fp8(group) if self.whole_stack else nullcontext()

    def layer(self, number: int, group: Any) -> AbstractContextManager:
        """Enter around one layer, and again around its recomputation."""
        inside = number in self.fp8_layers and not self.whole_stack
        return self.enter_fp8(group) if inside else nullcontext()

    def build(self, number: int) -> AbstractContextManager:
        """Enter while one layer is built."""
        return self.fp8_weights() if number in self.fp8_layers else nullcontext()
