"""In which order does a pipeline run its passes, and how long does a step take then?

The order is Megatron-Core's: after a warm-up of forward passes one forward and one backward pass in turn;
interleaved, micro-batches go through the virtual stages in rounds of as many as there are ranks. Times come from
running the passes in that order; sending takes no time then, and a backward pass twice its forward pass.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import inf

Pass = tuple[bool, int, int]  # whether backward, micro-batch, virtual stage
RUN_ROUNDS = 8  # of as many micro-batches as there are ranks: the last is like all that follow


@lru_cache
def order_of(rank: int, pp_size: int, vpp_size: int, micro_batches: int) -> tuple[Pass, ...]:
    """Return the passes of one rank in their order."""
    behind = pp_size - rank - 1
    turns = [
        (micro_batch, stage)
        for first in range(0, micro_batches, pp_size)
        for stage in range(vpp_size)
        for micro_batch in range(first, min(first + pp_size, micro_batches))
    ]
    ahead = min(behind if vpp_size == 1 else 2 * behind + (vpp_size - 1) * pp_size, len(turns))
    forward = [(False, *turn) for turn in turns]
    backward = [(True, micro_batch, vpp_size - 1 - stage) for micro_batch, stage in turns]
    in_turn = [each for pair in zip(forward[ahead:], backward, strict=False) for each in pair]
    return (*forward[:ahead], *in_turn, *backward[len(turns) - ahead :])


def step_seconds(chunks: Sequence[float], pp_size: int, micro_batches: int, limit: float = inf) -> float:
    """Return how long a step takes: run to its end, or for some rounds and from there on at the pace of the last.

    Args:
        chunks: what forward and backward of each model chunk take together, in pipeline order.
        limit: a step that will take as long is answered with this, as soon as it is seen.
    """
    run = min(micro_batches, RUN_ROUNDS * pp_size)
    # Micro-batches beyond those come no faster than the rank that has most to do works.
    least_beyond = (micro_batches - run) * max(sum(chunks[rank::pp_size]) for rank in range(pp_size))
    seconds = run_step(chunks, pp_size, run, limit - least_beyond)
    if micro_batches == run:
        return seconds
    if seconds >= limit - least_beyond:
        return limit
    round_seconds = seconds - run_step(chunks, pp_size, run - pp_size)
    return seconds + (micro_batches - run) / pp_size * round_seconds


def run_step(chunks: Sequence[float], pp_size: int, micro_batches: int, limit: float = inf) -> float:
    """Run a step pass by pass: each starts when its rank is free and what it needs is there.

    Args:
        limit: a step that will take as long is not run to its end, and answered with this.
    """
    work = [chunk / 3 for chunk in chunks] + [chunk * 2 / 3 for chunk in chunks]
    clocks = [0.0] * pp_size  # when the last pass of each rank ended
    left = [micro_batches * sum(chunks[rank::pp_size]) for rank in range(pp_size)]
    ended = [0.0]  # the start of the step, then every pass
    for rank, kind, needed in _passes_of_all(pp_size, len(chunks) // pp_size, micro_batches):
        clock, there = clocks[rank], ended[needed]
        clock = (clock if clock > there else there) + work[kind]  # max() is slower
        left[rank] -= work[kind]
        if clock + left[rank] >= limit:
            return limit
        clocks[rank] = clock
        ended.append(clock)
    return max(clocks)


@lru_cache(maxsize=16)  # a search runs one layout thousands of times, then the next
def _passes_of_all(pp_size: int, vpp_size: int, micro_batches: int) -> tuple[tuple[int, int, int], ...]:
    """Return the passes of all ranks in one row, each after what it needs: rank, chunk (backward: after all of them),
    and the place in this row, from 1 on, of what it needs (0: nothing)."""
    num_chunks = pp_size * vpp_size
    orders = [list(reversed(order_of(rank, pp_size, vpp_size, micro_batches))) for rank in range(pp_size)]
    passes: list[tuple[int, int, int]] = []
    places: dict[Pass, int] = {}  # by chunk instead of virtual stage
    while any(orders):
        for rank, order in enumerate(orders):
            while order:
                backward, micro_batch, stage = order[-1]
                chunk = stage * pp_size + rank
                if backward:
                    needed = (False, micro_batch, chunk) if chunk == num_chunks - 1 else (True, micro_batch, chunk + 1)
                else:
                    needed = (False, micro_batch, chunk - 1)
                if (backward or chunk) and needed not in places:
                    break
                passes.append((rank, chunk + backward * num_chunks, places.get(needed, 0)))
                places[backward, micro_batch, chunk] = len(passes)
                order.pop()
    return tuple(passes)


def most_in_flight(kept: Iterable[int], pp_size: int, rank: int, micro_batches: int) -> int:
    """Return the most that a rank keeps at once of its model chunks' activations.

    Args:
        kept: of one micro-batch, by virtual stage.
    """
    kept = list(kept)
    held = most = 0
    run = min(micro_batches, 4 * pp_size)  # the warm-up ends in the third round at the latest; later ones repeat
    for backward, _, stage in order_of(rank, pp_size, len(kept), run):
        held += -kept[stage] if backward else kept[stage]
        most = max(most, held)
    return most
