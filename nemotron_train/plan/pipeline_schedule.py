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
    vpp_size = len(chunks) // pp_size
    ranks = [
        _Rank(order_of(rank, pp_size, vpp_size, micro_batches), rank, micro_batches * sum(chunks[rank::pp_size]))
        for rank in range(pp_size)
    ]
    ended: dict[Pass, float] = {}  # by chunk instead of virtual stage
    waiting = ranks
    while waiting:
        for rank in waiting:
            rank.run_on(chunks, pp_size, ended)
            if rank.clock + rank.left >= limit:
                return limit
        waiting = [rank for rank in waiting if rank.place < len(rank.order)]
    return max(rank.clock for rank in ranks)


class _Rank:
    def __init__(self, order: Sequence[Pass], rank: int, left: float) -> None:
        self.order, self.rank = order, rank
        self.place, self.clock = 0, 0.0  # of the next pass in its order; when the last one ended
        self.left = left  # work that is not done

    def run_on(self, chunks: Sequence[float], pp_size: int, ended: dict[Pass, float]) -> None:
        """Run passes until one needs what is not there yet."""
        last = len(chunks) - 1
        while self.place < len(self.order):
            backward, micro_batch, stage = self.order[self.place]
            chunk = stage * pp_size + self.rank
            if backward:
                needed = (False, micro_batch, chunk) if chunk == last else (True, micro_batch, chunk + 1)
            else:
                needed = (False, micro_batch, chunk - 1)
            if (backward or chunk) and needed not in ended:
                return
            work = chunks[chunk] * (2 if backward else 1) / 3
            self.clock = max(self.clock, ended.get(needed, 0.0)) + work
            self.left -= work
            ended[backward, micro_batch, chunk] = self.clock
            self.place += 1


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
