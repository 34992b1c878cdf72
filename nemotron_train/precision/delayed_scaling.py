"""What does delayed scaling remember of a linear layer, and how do scales follow from it?

A tensor is quantised with the scale that the largest magnitudes of its last uses give, and its own maximum is noted for
the next. Everything starts with a scale of 1. Of Transformer Engine's five slots a layer (forward: input, weight,
output; backward: output gradient, input gradient) three are used, but all are kept, so that a checkpoint holds the same
for both.

Source: `DelayedScaling` of Transformer Engine 2.11 with margin 0 and the algorithm "max".
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_train.precision.fp8_reference import Fp8Format
from nemotron_train.precision.recipe import DELAYED_HISTORY_STEPS

INPUT, WEIGHT, OUTPUT_GRADIENT = 0, 1, 0  # slots; the first two of the forward pass

# Shapes: L length of the history, Q tensors that are quantised in one direction of a layer.


class AmaxHistory:
    """Scales of one direction of a layer. Row 0 of the history collects; the others are earlier uses, newest last."""

    def __init__(self, tensors: int, format: Fp8Format) -> None:
        self.format = format
        self.scale_Q = torch.ones(tensors)
        self.amax_LQ = torch.zeros(DELAYED_HISTORY_STEPS, tensors)

    def note(self, slot: int, amax: Tensor) -> None:
        """Take in the maximum of a tensor that is being quantised."""
        self.amax_LQ[0, slot] = torch.maximum(self.amax_LQ[0, slot], amax)

    def advance(self, amax_Q: Tensor) -> None:
        """Move what was collected into the history and compute the scales of the next use.

        Slots for which nothing was collected stay as they are. So does a scale while an infinity is remembered.

        Args:
            amax_Q: row 0, reduced over ranks.
        """
        used_Q = amax_Q != 0
        largest_Q = torch.maximum(self.amax_LQ[1:].amax(0), amax_Q)
        moved_LQ = torch.cat([torch.zeros_like(amax_Q)[None], self.amax_LQ[2:], amax_Q[None]])
        self.amax_LQ = torch.where(used_Q, moved_LQ, self.amax_LQ)
        quotient_Q = torch.full_like(largest_Q, self.format.largest) / largest_Q
        scale_Q = quotient_Q.clamp(max=torch.finfo(torch.float32).max)
        self.scale_Q = torch.where(used_Q & torch.isfinite(largest_Q), scale_Q, self.scale_Q)


class DelayedScales:
    """All that delayed scaling keeps of a linear layer."""

    def __init__(self, gradient_format: Fp8Format) -> None:
        self.forward = AmaxHistory(3, Fp8Format.e4m3)
        self.backward = AmaxHistory(2, gradient_format)

    def to_bytes(self) -> Tensor:
        """Return the state as a tensor of bytes, in the form that Transformer Engine's layers read too."""
        state = {
            "scale_fwd": self.forward.scale_Q,
            "amax_history_fwd": self.forward.amax_LQ,
            "scale_bwd": self.backward.scale_Q,
            "amax_history_bwd": self.backward.amax_LQ,
            # Without a recipe object, which only Transformer Engine has, it takes its default one until FP8 is entered.
            "extra_fp8_variables": {
                "fp8_checkpoint": True,
                "num_gemms": 1,
                "fp8_max_fwd": self.forward.format.largest,
                "fp8_max_bwd": self.backward.format.largest,
            },
        }
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def from_bytes(self, stored: Tensor) -> None:
        """Take over a state that `to_bytes`, or Transformer Engine, has made."""
        state = _WithoutTransformerEngine(io.BytesIO(stored.numpy().tobytes())).load()
        self.forward.scale_Q, self.forward.amax_LQ = state["scale_fwd"], state["amax_history_fwd"]
        self.backward.scale_Q, self.backward.amax_LQ = state["scale_bwd"], state["amax_history_bwd"]


def advance_together(histories: Sequence[AmaxHistory], group: Any) -> None:
    """Reduce the collected maxima over the ranks of `group` (None: no other ranks), and advance all histories."""
    collected = torch.cat([history.amax_LQ[0] for history in histories])
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(collected, dist.ReduceOp.MAX, group=group)
    counts = [len(history.scale_Q) for history in histories]
    for history, amax_Q in zip(histories, collected.split(counts), strict=True):
        history.advance(amax_Q)


class _WithoutTransformerEngine(pickle.Unpickler):
    """Reads a state with Transformer Engine's recipe object in it, without making that object."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return lambda owner, name: Unread()  # members of its enums, as some Pythons write them
        return Unread if module.startswith("transformer_engine.") else super().find_class(module, name)


class Unread:
    """Stands in for an object of Transformer Engine inside a stored state."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass
