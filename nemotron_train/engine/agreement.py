"""How do ranks come to one answer, so that they go on, or fail, together?"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nemotron_train.errors import CheckpointError, NemotronTrainError

Result = TypeVar("Result")


def any_rank_each(values: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each of the values is true on any rank; every rank gets the same answers."""
    flags = torch.tensor([int(value) for value in values], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def from_rank_zero(act: Callable[[], Result]) -> Result:
    """Let rank 0 look at or change the disk and tell all ranks what came of it, so that they go on, or fail, together.

    Raises:
        NemotronTrainError: on every rank, if rank 0's `act` raised it. An OSError there becomes a CheckpointError.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except NemotronTrainError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = CheckpointError(str(error))
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all_ranks(act: Callable[[], Result]) -> Result:
    """Let every rank read or change something of its own, and go on only if all of them could.

    Raises:
        NemotronTrainError: on every rank, if any rank's `act` raised it: the first rank's. An OSError there becomes a
            CheckpointError.
    """
    result, problem = None, None
    try:
        result = act()
    except NemotronTrainError as error:
        problem = error
    except OSError as error:
        problem = CheckpointError(str(error))
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((problem for problem in problems if problem is not None), None)
    if first is not None:
        raise first
    return result  # type: ignore[return-value]
