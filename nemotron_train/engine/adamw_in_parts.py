"""AdamW over a few weights at a time.

Transformer Engine's AdamW (2.11) keeps a float32 copy of every moment that is stored in less until the step of a whole
parameter group ends: for the 12B on two GPUs 46 GiB, which make the update the fullest moment of a run. In parts, only
those of one part are there at once.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from nemotron_train.plan.memory import ADAMW_ELEMENTS_AT_ONCE


def update_in_parts(adam: Any, at_once: int = ADAMW_ELEMENTS_AT_ONCE) -> None:
    """Let every step of `adam`, a `torch.optim.Optimizer`, pass over parts of its groups, of at most `at_once` elements
    or of one tensor."""
    adam.step = partial(_step, adam, at_once)


def _step(adam: Any, at_once: int) -> None:
    groups = adam.param_groups
    try:
        for group in groups:
            number = {"step": int(group["step"])} if "step" in group else {}
            for parameters in _parts(group["params"], at_once):
                # Each part gets the step number from before, which the update counts on.
                part = {**group, **number, "params": parameters}
                adam.param_groups = [part]
                type(adam).step(adam)
                group |= {name: value for name, value in part.items() if name != "params"}
    finally:
        adam.param_groups = groups


def _parts(parameters: Sequence[Tensor], at_once: int) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        if part and elements + parameter.numel() > at_once:
            yield part
            part, elements = [], 0
        part.append(parameter)
        elements += parameter.numel()
    if part:
        yield part
