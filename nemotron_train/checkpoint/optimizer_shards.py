"""Which pieces of the optimizer's state does this data-parallel rank write?

Megatron-Core's distributed optimizer lays all parameters end to end and gives each data-parallel rank a stretch of
them; of a parameter, that is a range of its elements. To save whole parameters ("fully_reshardable"), Megatron-Core
gathers master weights and moments of all ranks on every rank, and one rank writes them. But a range of elements is a
few boxes, and the format takes boxes of any size: so each rank writes its own, and nothing is gathered. What is stored
is the same; loading is Megatron-Core's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from nemotron_train.engine.optimizer import Optimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size in every dimension
_STATES = ("param", "exp_avg", "exp_avg_sq")


def write_own_shards(optimizer: Optimizer) -> None:
    """Let every part of the optimizer name its own shards when its state is saved."""
    for part in optimizer.chained_optimizers:
        part.sharded_param_state_fully_reshardable = partial(_own_state, part)


def _own_state(part: Any, model_state: dict[str, Any], is_loading: bool = False, metadata: Any = None) -> Any:
    if is_loading:
        return type(part).sharded_param_state_fully_reshardable(part, model_state, is_loading, metadata)
    stored_as = {stored.data: stored for stored in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    state: dict[int, dict[str, ShardedTensor]] = {}
    for bucket in buckets_of(part):
        for parameter, ranges in bucket["param_map"].items():
            held = part._get_main_param_and_optimizer_states(parameter)
            start, stop = ranges["param"].start, ranges["param"].end
            state[len(state)] = {
                f"{name}.{number}": shard
                for name in _STATES
                for number, shard in enumerate(
                    shards_of_range(stored_as[parameter], f"optimizer.state.{name}.", held[name].float(), start, stop)
                )
            }
    return state


def buckets_of(part: Any) -> Iterator[Mapping[str, Any]]:
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            yield from buckets


def shards_of_range(
    stored: ShardedTensor | ShardedTensorFactory, prefix: str, held: torch.Tensor, start: int, stop: int
) -> Iterator[ShardedTensor]:
    """Yield a range of elements of a parameter, or of its state, as boxes of what the parameter is stored as.

    Args:
        stored: the parameter, or the packed parameter, on this tensor-parallel rank.
        prefix: of the keys, before those of the parameter.
        held: elements `start` to `stop`, in row-major order, in the dtype to store.
    """
    flat = held.detach().view(-1)
    assert flat.numel() == stop - start, (prefix, flat.numel(), start, stop)
    first = 0  # of the stored part's elements, within the parameter
    for part in [stored] if isinstance(stored, ShardedTensor) else _parts_without_data(stored):
        assert part.prepend_axis_num == 0, part.key
        elements = prod(part.local_shape)
        inside = max(start, first), min(stop, first + elements)
        if inside[0] < inside[1]:
            place = inside[0] - start
            for offset, size in boxes_of_range(inside[0] - first, inside[1] - first, part.local_shape):
                yield ShardedTensor(
                    key=f"{prefix}{part.key}",
                    data=flat[place : place + prod(size)].view(size),
                    dtype=flat.dtype,
                    local_shape=size,
                    global_shape=part.global_shape,
                    global_offset=tuple(map(sum, zip(part.global_offset, offset, strict=True))),
                    axis_fragmentations=None,  # boxes are no regular grid
                    replica_id=(*part.replica_id[:-1], 0),  # no other data-parallel rank holds this range
                )
                place += prod(size)
        first += elements


def _parts_without_data(stored: ShardedTensorFactory) -> list[ShardedTensor]:
    """Build only where the parts lie: to cut a weight that lives in FP8 would dequantise it."""
    places = torch.empty(stored.data.shape, dtype=stored.data.dtype, device="meta")
    return replace(stored, data=places).build()


def boxes_of_range(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Yield the fewest boxes that hold elements `start` to `stop` of a row-major array, in order; none for an empty
    range."""
    if len(shape) == 1 or start >= stop:
        if start < stop:
            yield (start,), (stop - start,)
        return
    row = prod(shape[1:])
    (first, skip), (last, rest) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _within_row(first, skip, rest, shape)
        return
    if skip:
        yield from _within_row(first, skip, row, shape)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if rest:
        yield from _within_row(last, 0, rest, shape)


def _within_row(number: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    for offset, size in boxes_of_range(start, stop, shape[1:]):
        yield (number, *offset), (1, *size)
