"""The cut is the best there is, or with virtual stages mostly, on patterns small enough to try them all."""

import itertools
import random
import statistics
from collections.abc import Iterator

import pytest

from nemotron_train.errors import ConfigError
from nemotron_train.plan.layer_times import stage_costs
from nemotron_train.plan.pattern import LayerKind, parse_pattern
from nemotron_train.plan.pipeline_cut import StageCosts, chunk_costs, cut_pipeline, rank_costs
from nemotron_train.plan.run_plan import RunPlan, plan_run
from tests.plan import simulated_pipeline
from tests.plan.small import experiment_with, plan_of


def all_cuts(num_layers: int, num_chunks: int) -> Iterator[list[range]]:
    for cuts in itertools.combinations(range(1, num_layers), num_chunks - 1):
        yield [range(*pair) for pair in itertools.pairwise((0, *cuts, num_layers))]


def random_case(seed: int, num_chunks: int) -> tuple[str, StageCosts]:
    dice = random.Random(seed)
    pattern = "".join(dice.choices("M*-", k=dice.randint(num_chunks, 12)))
    cost_of = {letter: dice.randint(1, 9) for letter in "M*-"}
    return pattern, StageCosts(tuple(cost_of[letter] for letter in pattern), dice.randint(0, 4), dice.randint(0, 25))


@pytest.mark.parametrize("pp_size", [2, 3, 4])
def test_stages_are_as_even_as_trying_every_cut(pp_size: int) -> None:
    """Fails if the cut is not optimal, leaves out or repeats a layer, or has an empty stage."""
    for seed in range(40):
        pattern, costs = random_case(seed, pp_size)
        chunks = cut_pipeline(parse_pattern(pattern), costs, pp_size, 1, 4 * pp_size)
        assert [layer for chunk in chunks for layer in chunk] == list(range(len(pattern)))
        assert len(chunks) == pp_size
        assert all(chunks)
        best = min(max(chunk_costs(tried, costs)) for tried in all_cuts(len(pattern), pp_size))
        assert max(chunk_costs(chunks, costs)) == best, pattern


@pytest.mark.parametrize(("pp_size", "vpp_size", "rounds"), [(2, 2, 4), (2, 3, 4), (3, 2, 4), (4, 2, 4), (2, 3, 12)])
def test_a_step_with_virtual_stages_is_about_as_short_as_any_cut_makes_it(
    pp_size: int, vpp_size: int, rounds: int
) -> None:
    """Fails if the search stops at cuts that are mostly not the best, or takes a layer away. A step is run pass by pass
    in Megatron-Core's order, with costs from 1 to 9."""
    beyond = []
    for seed in range(15):
        pattern, costs = random_case(seed, pp_size * vpp_size)
        chunks = cut_pipeline(parse_pattern(pattern), costs, pp_size, vpp_size, rounds * pp_size)
        assert [layer for chunk in chunks for layer in chunk] == list(range(len(pattern)))
        assert all(chunks)
        best, found = (
            min(simulated_pipeline.seconds(chunk_costs(tried, costs), pp_size, rounds * pp_size) for tried in cuts)
            for cuts in (all_cuts(len(pattern), pp_size * vpp_size), [chunks])
        )
        beyond.append(found / best - 1)
    assert max(beyond) < 0.1
    assert statistics.mean(beyond) < 0.015
    assert statistics.median(beyond) < 1e-9


def test_rank_costs_add_up_the_chunks_that_a_rank_holds() -> None:
    """Fails if chunks are dealt to ranks in blocks instead of round robin, or the ends count for the wrong rank."""
    costs = StageCosts(layers=(1, 10, 100, 1000), first=0.5, last=0.25)
    chunks = [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    assert rank_costs(chunks, costs, pp_size=2) == [101.5, 1010.25]
    assert rank_costs(chunks, costs, pp_size=4) == [1.5, 10, 100, 1000.25]


def test_bars_in_the_pattern_are_obeyed() -> None:
    """Fails if a cut by hand is moved to a better place."""
    plan = plan_of("model.layer_pattern=M|-M*-M-M*-", "parallel=pipeline_2", world_size=2)
    assert plan.chunks == (range(0, 1), range(1, 10))
    virtual = ["model.layer_pattern=M|-M*|-M-|M*-", "parallel=pipeline_2", "parallel.virtual_pipeline_size=2"]
    plan = plan_of(*virtual, "train.micro_batch_size=4", world_size=2)
    assert plan.chunks_of(0) == (range(0, 1), range(4, 7))
    assert plan.chunks_of(1) == (range(1, 4), range(7, 10))


@pytest.mark.parametrize(
    ("pattern", "pp_size", "vpp_size", "expected"),
    [
        ("M|-|M", 2, 1, ["3 pieces", "pipeline_parallel_size=2", "virtual_pipeline_size=1", "Write 1 `|`"]),
        ("M-M", 2, 2, ["3 layers", "4 pieces", "pipeline_parallel_size=2", "virtual_pipeline_size=2"]),
    ],
)
def test_a_cut_that_cannot_be_is_refused(pattern: str, pp_size: int, vpp_size: int, expected: list[str]) -> None:
    """Fails if a wrong number of pieces is accepted, or the message hides which keys clash."""
    layers = pattern.replace("|", "")
    with pytest.raises(ConfigError) as caught:
        cut_pipeline(parse_pattern(pattern), StageCosts((1,) * len(layers), 0, 0), pp_size, vpp_size, 8)
    assert [part for part in expected if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("pp_size", "vpp_size", "imbalance"), [(2, 1, 0.02), (4, 1, 0.031), (4, 2, 0.03), (4, 4, 0.02), (4, 5, 0.02)]
)
def test_the_12b_is_cut_evenly(pp_size: int, vpp_size: int, imbalance: float) -> None:
    """Fails if the output layer (almost a fifth of a quarter of the model) is not counted, or many chunks are less
    even."""
    costs = nano(pp_size, vpp_size).pipeline_costs()
    assert max(costs) * pp_size / sum(costs) - 1 < imbalance


def test_the_12b_on_four_stages_is_cut_as_well_as_its_layers_allow() -> None:
    """Fails if one of all 35,990 cuts of the 62 layers has a faster slowest stage."""
    plan = nano(4, 1)
    costs = stage_costs(plan.config, plan.pattern, plan.config.train.seq_length)
    before = [0.0, *itertools.accumulate(costs.layers)]
    whole = before[-1] + costs.last
    best = min(
        max(before[a], before[b] - before[a], before[c] - before[b], whole - before[c])
        for a, b, c in itertools.combinations(range(1, 62), 3)
    )
    assert max(plan.pipeline_costs()) == pytest.approx(best)


def test_samples_of_128k_tokens_move_the_cuts() -> None:
    """Fails if layers are weighed at another length than that of the run: there an attention layer takes longer than
    several Mamba layers."""
    short, long = nano(4, 1), nano(4, 1, "train.seq_length=131072", "train.global_batch_size=48")
    assert short.chunks != long.chunks
    costs = stage_costs(long.config, long.pattern, 131072).layers
    by_kind = dict(zip(long.layers, costs, strict=True))
    assert by_kind[LayerKind.attention] > 3 * by_kind[LayerKind.mamba]
    short_costs = stage_costs(short.config, short.pattern, 8192).layers
    assert short_costs[long.layers.index(LayerKind.attention)] < short_costs[2]


def test_the_cut_is_for_the_length_that_most_tokens_have() -> None:
    """Fails if layers are weighed at train.seq_length though most samples have another, or at the first length or the
    longest; or if the banner's shares are of another length than the cut's."""
    phases = ("train.global_batch_size=48", "data.phases.1.start_tokens=6_291_456_000")
    short, long = nano(4, 1, *phases), nano(4, 1, *phases, "train.seq_length=131072")
    at_first = nano(4, 1, *phases, "data.phases.0.seq_length=131072")
    later = nano(4, 1, *phases, "data.phases.1.seq_length=131072", "data.phases.2.seq_length=131072")
    for plan, same in ((at_first, short), (later, long)):
        assert plan.chunks == same.chunks
        assert plan.pipeline_costs() == same.pipeline_costs()


@pytest.mark.parametrize(("pp_size", "vpp_size"), [(2, 4), (4, 2), (4, 4)])
def test_virtual_stages_of_the_12b_shorten_the_step(pp_size: int, vpp_size: int) -> None:
    """Fails if virtual stages are so uneven that ranks wait for each other: the step, run event by event, must beat
    that of the same pipeline without them."""
    seconds = []
    for stages in (1, vpp_size):
        plan = nano(pp_size, stages)
        costs = stage_costs(plan.config, plan.pattern, plan.config.train.seq_length)
        micro_batches = plan.batches.num_micro_batches_at(0)
        seconds.append(simulated_pipeline.seconds(chunk_costs(plan.chunks, costs), pp_size, micro_batches))
    assert seconds[1] < seconds[0]


def test_virtual_stages_are_cut_for_the_largest_batch() -> None:
    """Fails if a run whose batch grows is cut for its few first steps."""
    growing = "train.batch_schedule=[{start_tokens: 1_006_632_960, global_batch_size: 64}]"
    few, many, grown = (
        nano(4, 4, f"train.global_batch_size={batch}", *changes).chunks
        for batch, changes in ((4, ()), (64, ()), (4, (growing,)))
    )
    assert few != many
    assert grown == many


def nano(pp_size: int, vpp_size: int, *changes: str) -> RunPlan:
    sizes = [f"parallel.pipeline_parallel_size={pp_size}", f"parallel.virtual_pipeline_size={vpp_size}"]
    config = experiment_with("nemotron_nano_12b_v2", *sizes, "train.global_batch_size=64", *changes)
    return plan_run(config, 4 * pp_size)
