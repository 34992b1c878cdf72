"""Where the pipeline is cut: which layers every model chunk holds.

Chunk c lives on pipeline rank c % pp_size as its virtual stage c // pp_size, which is the order in which
Megatron-Core's interleaved schedule visits them. Without virtual stages the slowest rank sets the pace of all, so its
cost is what a cut makes small; with them it is the time of a step, run pass by pass. The embedding counts for the first
chunk and the output layer for the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, cycle, pairwise
from math import inf

from nemotron_train.errors import ConfigError
from nemotron_train.plan.pattern import ParsedPattern
from nemotron_train.plan.pipeline_schedule import RUN_ROUNDS, step_seconds

TRIED_PASSES = 1_000_000  # in all the steps that are tried: about a second where many are run to their end
LEAST_GAIN = 1e-9  # of a step's time: less is rounding

Join = Callable[[float, float], float]  # (cost of a chunk, score of the chunks after it) -> score


@dataclass(frozen=True)
class StageCosts:
    """What the parts of a model cost, in any one unit (time, FLOPs)."""

    layers: tuple[float, ...]
    first: float  # what the first chunk does besides its layers (embedding)
    last: float  # what the last chunk does besides its layers (final norm, output layer)


def cut_pipeline(
    pattern: ParsedPattern, costs: StageCosts, pp_size: int, vpp_size: int, micro_batches: int
) -> tuple[range, ...]:
    """Return every model chunk's range of global layer indices, in pipeline order.

    Args:
        micro_batches: of a step on a rank; it matters with virtual stages only.

    Raises:
        ConfigError: as `check_cut`.
    """
    check_cut(pattern, pp_size, vpp_size)
    num_layers, num_chunks = len(pattern.layers), pp_size * vpp_size
    if pattern.cuts is not None:
        return _ranges(pattern.cuts, num_layers)
    cuts = _cut_evenly(_ChunkCosts(costs, num_chunks))
    return _ranges(
        _shift_cuts(cuts, costs, pp_size, min(micro_batches, RUN_ROUNDS * pp_size)) if vpp_size > 1 else cuts,
        num_layers,
    )


def check_cut(pattern: ParsedPattern, pp_size: int, vpp_size: int) -> None:
    """Raise a ConfigError if `|` does not give exactly pp_size x vpp_size pieces, or layers are fewer than pieces."""
    num_layers, num_chunks = len(pattern.layers), pp_size * vpp_size
    wanted = (
        f"the {num_chunks} pieces of parallel.pipeline_parallel_size={pp_size} x "
        f"parallel.virtual_pipeline_size={vpp_size}"
    )
    if pattern.cuts is not None and len(pattern.cuts) + 1 != num_chunks:
        raise ConfigError(
            f"model.layer_pattern is cut by hand into {len(pattern.cuts) + 1} pieces, not into {wanted}. "
            f"Write {num_chunks - 1} `|`, or none to have it cut by cost."
        )
    if num_layers < num_chunks:
        raise ConfigError(f"model.layer_pattern has {num_layers} layers, too few for {wanted}. Lower one of them.")


def rank_costs(chunks: Sequence[range], costs: StageCosts, pp_size: int) -> list[float]:
    """Return what every pipeline rank does, all its chunks together."""
    by_chunk = chunk_costs(chunks, costs)
    return [sum(by_chunk[rank::pp_size]) for rank in range(pp_size)]


def chunk_costs(chunks: Sequence[range], costs: StageCosts) -> list[float]:
    """Return what every chunk does, the ends of the model included."""
    by_chunk = [sum(costs.layers[layer] for layer in chunk) for chunk in chunks]
    by_chunk[0] += costs.first
    by_chunk[-1] += costs.last
    return by_chunk


class _ChunkCosts:
    """What a chunk of given layers costs at its place in the pipeline."""

    def __init__(self, costs: StageCosts, num_chunks: int) -> None:
        self.num_layers, self.num_chunks = len(costs.layers), num_chunks
        self.first_cost, self.last_cost = costs.first, costs.last
        self.before = [0.0, *accumulate(costs.layers)]

    def of_layers(self, start: int, end: int) -> float:
        return self.before[end] - self.before[start]

    def of(self, chunk: int, start: int, end: int) -> float:
        first, last = chunk == 0, chunk == self.num_chunks - 1
        return self.of_layers(start, end) + first * self.first_cost + last * self.last_cost

    def ends(self, chunk: int, start: int) -> range:
        """Return where a chunk may end: after at least one layer, leaving at least one for each that follows."""
        if chunk == self.num_chunks - 1:
            return range(self.num_layers, self.num_layers + 1)
        return range(start + 1, self.num_layers - (self.num_chunks - chunk - 1) + 1)


def _cut_evenly(costs: _ChunkCosts) -> tuple[int, ...]:
    """Make the most expensive chunk as cheap as can be, and among such cuts the rest as even as can be.

    Two exact passes of dynamic programming from the last chunk backwards: the first finds the smallest possible
    maximum, the second the smallest sum of squares that keeps to it.
    """
    edges = [costs.num_layers * chunk // costs.num_chunks for chunk in range(costs.num_chunks + 1)]
    of_equal_counts = max(costs.of(chunk, *ends) for chunk, ends in enumerate(pairwise(edges)))  # no best is above it
    maximum = _best_cuts(costs, limit=of_equal_counts, join=max)[0]
    return _best_cuts(costs, limit=maximum, join=lambda cost, rest: cost * cost + rest)[1]


def _best_cuts(costs: _ChunkCosts, limit: float, join: Join) -> tuple[float, tuple[int, ...]]:
    best: dict[int, tuple[float, tuple[int, ...]]] = {costs.num_layers: (0.0, ())}
    for chunk in reversed(range(costs.num_chunks)):
        previous, best = best, {}
        for start in range(chunk, costs.num_layers) if chunk else (0,):
            options = []
            for end in costs.ends(chunk, start):
                if (cost := costs.of(chunk, start, end)) > limit:
                    break  # more layers cost more
                if end in previous:
                    options.append((join(cost, previous[end][0]), (end, *previous[end][1])))
            if options:
                best[start] = min(options)
    score, ends = best[0]
    return score, ends[:-1]


@cache
def _shift_cuts(cuts: tuple[int, ...], costs: StageCosts, pp_size: int, micro_batches: int) -> tuple[int, ...]:
    """Shift cuts by one layer, one or several in a row, as long as that shortens a step run pass by pass.

    Ranks with virtual stages wait for each other chunk by chunk, and their sums count too, so neither alone says which
    cut is best. The result is a local optimum or, where `TRIED_PASSES` ran out (from about 32 chunks on), the best so
    far; on patterns small enough to try all cuts it is mostly the best of them.
    """
    num_layers = len(costs.layers)
    passes_of_a_step = 2 * min(micro_batches, 2 * RUN_ROUNDS * pp_size) * (len(cuts) + 1)
    tried = 0

    def seconds(some_cuts: Sequence[int], limit: float) -> float:
        nonlocal tried
        chunks = chunk_costs(_ranges(some_cuts, num_layers), costs)
        # A rank starts when those before it have passed on a micro-batch, and they end after it.
        least = max(micro_batches * sum(chunks[rank::pp_size]) + sum(chunks[:rank]) for rank in range(pp_size))
        if least >= limit:
            return limit
        tried += 1
        return step_seconds(chunks, pp_size, micro_batches, limit)

    best, shortest = cuts, seconds(cuts, inf)
    shifts = [
        (first, first + count, by)
        for count in range(1, len(cuts) + 1)
        for first in range(len(cuts) - count + 1)
        for by in (-1, 1)
    ]
    failed = 0
    for first, end, by in cycle(shifts):
        if failed == len(shifts) or tried * passes_of_a_step > TRIED_PASSES:
            return best
        shifted = (*best[:first], *(cut + by for cut in best[first:end]), *best[end:])
        failed += 1
        if all(start < end for start, end in pairwise((0, *shifted, num_layers))):
            found = seconds(shifted, shortest * (1 - LEAST_GAIN))
            if found < shortest * (1 - LEAST_GAIN):
                best, shortest, failed = shifted, found, 0
    return best


def _ranges(cuts: Sequence[int], num_layers: int) -> tuple[range, ...]:
    edges = (0, *cuts, num_layers)
    return tuple(range(start, end) for start, end in pairwise(edges))
