"""Where the pipeline is cut: which layers every model chunk holds.

Chunk c lives on pipeline rank c % pp_size as its virtual stage c // pp_size, which is the order in which
Megatron-Core's interleaved schedule visits them. The slowest rank sets the pace of all, so its cost is what a cut
makes small; the embedding counts for the first chunk and the output layer for the last.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from nemotron_train.errors import ConfigError
from nemotron_train.plan.pattern import ParsedPattern

KEPT_PARTIAL_CUTS = 20_000  # in all, when virtual stages tie chunks of one rank together: about half a second

Join = Callable[[float, float], float]  # (cost of a chunk, score of the chunks after it) -> score
PartialCut = tuple[float, float, tuple[float, ...], tuple[int, ...]]


@dataclass(frozen=True)
class StageCosts:
    """What the parts of a model cost, in any one unit (time, FLOPs)."""

    layers: tuple[float, ...]
    first: float  # what the first chunk does besides its layers (embedding)
    last: float  # what the last chunk does besides its layers (final norm, output layer)


def cut_pipeline(pattern: ParsedPattern, costs: StageCosts, pp_size: int, vpp_size: int) -> tuple[range, ...]:
    """Return every model chunk's range of global layer indices, in pipeline order.

    Raises:
        ConfigError: as `check_cut`.
    """
    check_cut(pattern, pp_size, vpp_size)
    num_layers, num_chunks = len(pattern.layers), pp_size * vpp_size
    if pattern.cuts is not None:
        return _ranges(pattern.cuts, num_layers)
    of_chunks = _ChunkCosts(costs, num_chunks)
    cuts = _cut_evenly(of_chunks)
    return _ranges(_cut_for_ranks(of_chunks, pp_size, cuts) if vpp_size > 1 else cuts, num_layers)


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


@dataclass(frozen=True)
class _Limits:
    """What the even cut has already reached: costs of a rank, and of a chunk."""

    rank: float
    chunk: float


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
    maximum = _best_cuts(costs, limit=float("inf"), join=max)[0]
    return _best_cuts(costs, limit=maximum, join=lambda cost, rest: cost * cost + rest)[1]


def _best_cuts(costs: _ChunkCosts, limit: float, join: Join) -> tuple[float, tuple[int, ...]]:
    best: dict[int, tuple[float, tuple[int, ...]]] = {costs.num_layers: (0.0, ())}
    for chunk in reversed(range(costs.num_chunks)):
        previous, best = best, {}
        for start in range(chunk, costs.num_layers) if chunk else (0,):
            options = [
                (join(cost, previous[end][0]), (end, *previous[end][1]))
                for end in costs.ends(chunk, start)
                if end in previous and (cost := costs.of(chunk, start, end)) <= limit
            ]
            if options:
                best[start] = min(options)
    score, ends = best[0]
    return score, ends[:-1]


def _cut_for_ranks(costs: _ChunkCosts, pp_size: int, even_cuts: tuple[int, ...]) -> tuple[int, ...]:
    """Make the most expensive rank, over all its virtual stages, as cheap as can be, with no chunk more expensive than
    the even cut's most expensive one.

    Ranks keep step with each other chunk by chunk, so uneven chunks make all wait even where their sums are even. A
    rank's chunks lie apart, so a partial cut has to remember every rank's load. The even cut bounds what is worth
    keeping; within it the best partial cuts at each place are followed: all of them for small models, enough for large
    ones.
    """
    kept = max(KEPT_PARTIAL_CUTS // (costs.num_layers * costs.num_chunks), 8)
    edges = (0, *even_cuts, costs.num_layers)
    loads = [0.0] * pp_size
    loads[0] += costs.first_cost
    loads[-1] += costs.last_cost
    # place -> partial cuts as (largest load, sum of squared chunk costs, load of every rank, cuts)
    beam: dict[int, list[PartialCut]] = {0: [(max(loads), 0.0, tuple(loads), ())]}
    for chunk in range(costs.num_chunks):
        loads[chunk % pp_size] += costs.of_layers(edges[chunk], edges[chunk + 1])
    limits = _Limits(rank=max(loads), chunk=max(costs.of(c, *edge) for c, edge in enumerate(pairwise(edges))))
    for chunk in range(costs.num_chunks):
        longer = _lengthen(beam, costs, chunk, chunk % pp_size, limits)
        beam = {end: heapq.nsmallest(kept, _one_per_loads(partial_cuts)) for end, partial_cuts in longer.items()}
    finished = beam.get(costs.num_layers)
    return finished[0][3][:-1] if finished else even_cuts


def _lengthen(
    beam: dict[int, list[PartialCut]], costs: _ChunkCosts, chunk: int, rank: int, limits: _Limits
) -> dict[int, list[PartialCut]]:
    """Add one chunk, on one rank, to every partial cut, in every way that keeps to the limits."""
    longer: dict[int, list[PartialCut]] = {}
    for start, partial_cuts in beam.items():
        for end in costs.ends(chunk, start):
            cost = costs.of(chunk, start, end)
            if cost > limits.chunk:
                break  # longer chunks cost more
            layers_cost = costs.of_layers(start, end)
            for largest, squares, loads, cuts in partial_cuts:
                load = loads[rank] + layers_cost
                if load <= limits.rank:
                    new_loads = (*loads[:rank], load, *loads[rank + 1 :])
                    partial_cut = (max(largest, load), squares + cost * cost, new_loads, (*cuts, end))
                    longer.setdefault(end, []).append(partial_cut)
    return longer


def _one_per_loads(partial_cuts: list[PartialCut]) -> Iterable[PartialCut]:
    """Keep the best of the partial cuts that load every rank the same: what follows cannot tell them apart."""
    best: dict[tuple[float, ...], PartialCut] = {}
    for partial_cut in partial_cuts:
        loads = partial_cut[2]
        if loads not in best or partial_cut < best[loads]:
            best[loads] = partial_cut
    return best.values()


def _ranges(cuts: Sequence[int], num_layers: int) -> tuple[range, ...]:
    edges = (0, *cuts, num_layers)
    return tuple(range(start, end) for start, end in pairwise(edges))
