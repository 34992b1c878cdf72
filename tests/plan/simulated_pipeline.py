"""Runs a pipeline schedule event by event: the oracle for waiting times and for what is in flight.

The order of chunks is Megatron-Core's own schedule table; an operation starts when its rank is free and what it needs
has arrived. Sending takes no time; a backward pass takes twice its forward pass.
"""

from types import SimpleNamespace
from typing import Any

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

Operation = tuple[str, int, int]  # F or B, micro-batch, virtual stage


def order_of(rank: int, pp_size: int, vpp_size: int, micro_batches: int) -> list[Operation]:
    """Return the passes of one rank in the order in which Megatron-Core runs them."""
    place: Any = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pp_size, rank=lambda: rank),
        virtual_pipeline_model_parallel_size=vpp_size if vpp_size > 1 else None,
    )
    _, _, ahead, _ = get_pp_rank_microbatches(micro_batches, vpp_size, pp_size, p2p_communicator=place)
    table = get_schedule_table(micro_batches, vpp_size, pp_size)
    forward = [("F", micro_batch, stage) for micro_batch, stage in table]
    backward = [("B", micro_batch, vpp_size - 1 - stage) for micro_batch, stage in table]
    order = forward[:ahead]
    for one_forward, one_backward in zip(forward[ahead:], backward, strict=False):
        order += [one_forward, one_backward]
    return order + backward[len(forward) - ahead :]


def seconds(chunks: list[float], pp_size: int, micro_batches: int) -> float:
    """Return how long a step takes, given what forward and backward of each chunk take together."""
    vpp_size = len(chunks) // pp_size
    orders = [order_of(rank, pp_size, vpp_size, micro_batches) for rank in range(pp_size)]
    done: dict[tuple[str, int, int], float] = {}
    clocks, positions = [0.0] * pp_size, [0] * pp_size
    while any(position < len(order) for position, order in zip(positions, orders, strict=True)):
        before = sum(positions)
        for rank, order in enumerate(orders):
            while positions[rank] < len(order):
                kind, micro_batch, stage = order[positions[rank]]
                chunk = stage * pp_size + rank
                ready = _ready(kind, micro_batch, chunk, len(chunks), done)
                if ready is None:
                    break
                clocks[rank] = max(clocks[rank], ready) + chunks[chunk] * (1 if kind == "F" else 2) / 3
                done[kind, micro_batch, chunk] = clocks[rank]
                positions[rank] += 1
        assert sum(positions) > before, "the schedule waits for itself"
    return max(clocks)


def _ready(
    kind: str, micro_batch: int, chunk: int, num_chunks: int, done: dict[tuple[str, int, int], float]
) -> float | None:
    """Return when what an operation needs is there; None: not yet."""
    if kind == "F":
        return 0.0 if chunk == 0 else done.get(("F", micro_batch, chunk - 1))
    if chunk == num_chunks - 1:
        return done.get(("F", micro_batch, chunk))
    return done.get(("B", micro_batch, chunk + 1))
