"""How does a weight that lives only in FP8 get into a checkpoint, and out of one?

A checkpoint does not tell what ranks held weights in. It stores what a bfloat16 weight would be, the master weight
rounded: each data-parallel rank writes its range of it, as it does of the master weights, so nothing is gathered and
nothing is lost to FP8. Loading quantises what is read, as an update of the optimizer does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor, nn

from nemotron_train.checkpoint.optimizer_shards import buckets_of, shards_of_range
from nemotron_train.engine.optimizer import Optimizer


def lives_in_fp8(weight: Any) -> bool:
    """Whether ranks hold this weight in FP8 and in nothing else."""
    return is_float8tensor(weight)


def stored_from_masters(weights: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a chunk's sharded weights, to be saved, with FP8 weights as ranges of the optimizer's master weights."""
    names = {stored.data: name for name, stored in _of_fp8(weights)}
    in_fp8 = set(names.values())
    state = {name: stored for name, stored in weights.items() if name not in in_fp8}
    for parameter, master, start, stop in _master_ranges(optimizer, names):
        name = names[parameter]
        rounded = master.to(parameter.dtype)
        for number, shard in enumerate(shards_of_range(weights[name], "", rounded, start, stop)):
            state[f"{name}.{number}"] = shard
    return state


def loaded_as_plain(weights: dict[str, Any]) -> dict[str, Any]:
    """Return a chunk's sharded weights, to be loaded, with room in their own dtype for those that live in FP8."""
    room = {
        name: replace(stored, data=torch.empty(stored.data.shape, dtype=stored.data.dtype, device=stored.data.device))
        for name, stored in _of_fp8(weights)
    }
    return {**weights, **room}


def take_as_masters(optimizer: Optimizer, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make loaded weights the master weights of those that live in FP8: Megatron-Core would take the rounded ones."""
    values = {parameter: weights[name] for name, parameter in module.named_parameters() if lives_in_fp8(parameter)}
    for parameter, master, start, stop in _master_ranges(optimizer, values):
        master.copy_(values[parameter].view(-1)[start:stop])


def _of_fp8(weights: dict[str, Any]) -> Iterator[tuple[str, ShardedTensor | ShardedTensorFactory]]:
    for name, stored in weights.items():
        if isinstance(stored, ShardedTensor | ShardedTensorFactory) and lives_in_fp8(stored.data):
            yield name, stored


def _master_ranges(optimizer: Optimizer, wanted: Mapping[Tensor, Any]) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Yield, of the parameters that are wanted, this rank's elements of the master weights and which they are."""
    for part in optimizer.chained_optimizers:
        for bucket in buckets_of(part):
            for parameter, ranges in bucket["param_map"].items():
                if parameter in wanted:
                    master = part._get_main_param_and_optimizer_states(parameter)["param"].detach()
                    yield parameter, master, ranges["param"].start, ranges["param"].end
