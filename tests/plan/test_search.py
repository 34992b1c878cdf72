"""Layouts that fit: what is found runs as said, and what is left out is left out for the reason given."""

import functools
import re
import shlex
from dataclasses import replace

import pytest

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import Recompute
from nemotron_train.plan.measured import H100, H200
from nemotron_train.plan.memory import memory_gib_per_gpu, plan_memory
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.plan.search import SHOWN, Found, batch_advice, describe_search, refusal, search_json, search_layouts
from nemotron_train.plan.step_time import plan_time
from tests.plan.small import experiment_with

NANO = "nemotron_nano_12b_v2"
SHORT = "model.layer_pattern=M-M-M-M*-M-M-M-M*-"  # quickly cut


@functools.cache
def found_on(world_size: int, *changes: str) -> Found:
    return search_layouts(experiment_with(NANO, *changes), world_size, H200)


def test_a_batch_of_736_needs_32_gpus_a_replica_on_1024() -> None:
    """Fails if a layout is offered whose batch does not divide: 736 = 2^5 x 23, and 1,024 GPUs are 2^10."""
    found = found_on(1024)
    assert found.candidates
    for each in found.candidates:
        assert each.tensor * each.context * each.pipeline % 32 == 0
    text = describe_search(found)
    assert "736 = 2^5 x 23" in text
    assert "only where tensor x context x pipeline is a multiple of 32" in text
    assert "with tensor 4 alone: a batch of 512 or 768, or 736 GPUs (92 nodes) or 1,472 GPUs (184 nodes)" in text


@pytest.mark.parametrize("world_size", [736, 1024])
def test_advice_works(world_size: int) -> None:
    """Fails if a batch or a number of GPUs that is recommended is refused in its turn."""
    for line in batch_advice(experiment_with(NANO), world_size):
        if not line.startswith("with tensor"):
            continue
        tensor, *batches = map(int, re.findall(r"\d+", line.partition(", or")[0]))
        gpus = [int(count.replace(",", "")) for count in re.findall(r"([\d,]+) GPUs", line)]
        parallel = [f"parallel.tensor_parallel_size={tensor}", f"parallel.sequence_parallel={str(tensor > 1).lower()}"]
        assert batches
        assert len(gpus) == 2
        for batch in batches:
            plan_run(experiment_with(NANO, *parallel, f"train.global_batch_size={batch}"), world_size)
        for count in gpus:
            plan_run(experiment_with(NANO, *parallel), count)


def test_a_batch_that_divides_needs_no_advice() -> None:
    """Fails if a run that works everywhere is told to change."""
    assert list(batch_advice(experiment_with(NANO), 736)) == []


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ((), 1024),
        (("train.global_batch_size=64", SHORT, "precision.bf16_last_layers=0"), 16),
        (("train.global_batch_size=8", f"{SHORT[:-6]}|{SHORT[-6:]}", "parallel.pipeline_parallel_size=2"), 8),
    ],
)
def test_the_layouts_shown_do_what_they_promise(changes: tuple[str, ...], world_size: int) -> None:
    """Fails if the overrides shown plan another run than the one ranked: cut for another micro-batch or way to
    recompute, with virtual stages or without; or cut by hand for another layout."""
    first = found_on(world_size, *changes).candidates[:SHOWN]
    assert any(each.pipeline > 1 for each in first)
    assert any(each.virtual_pipeline > 1 for each in first) == bool(changes)
    for each in first:
        overrides = [f"experiment={NANO}", *changes, *shlex.split(each.overrides())]
        plan = plan_run(load_config(overrides), world_size)
        assert plan.pattern.cuts is None
        assert memory_gib_per_gpu(plan_memory(plan)) == pytest.approx(each.memory_gib)
        assert plan_time(plan).tokens_per_second_per_gpu == pytest.approx(each.tokens_per_second_per_gpu)


def test_layouts_are_ranked_and_fit() -> None:
    """Fails if a slower layout stands above a faster one, or one needs more memory than there is."""
    found = search_layouts(experiment_with(NANO, "train.global_batch_size=8"), 4, H100)
    rates = [each.tokens_per_second_per_gpu for each in found.candidates]
    assert rates == sorted(rates, reverse=True)
    assert max(each.memory_gib for each in found.candidates) < 79.6
    assert "needs more than the 79.6 GiB of H100" in dict(found.refused)


def test_a_layout_is_not_recomputed_where_that_is_refused() -> None:
    """Fails if a way to recompute is offered that the run would refuse, or the search ends over one."""
    graphs = experiment_with(NANO, "train.global_batch_size=8", "train.seq_length=32768", "train.cuda_graphs=true")
    found = search_layouts(graphs, 8, H100)
    assert {each.recompute for each in found.candidates} == {Recompute.none, Recompute.selective}
    assert any("train.recompute=full" in reason for reason, _ in found.refused)


BF16 = ("precision.format=bf16", "precision.bf16_first_layers=0", "precision.bf16_last_layers=0")
TENSOR, PIPELINE = "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ((f"{TENSOR}=16",), "model.mamba_num_groups=8 cannot be split over parallel.tensor_parallel_size=16"),
        (("train.seq_length=8064",), "fp8_block takes multiples of N tokens there"),
        (
            (f"{PIPELINE}=4", "parallel.virtual_pipeline_size=2", "train.global_batch_size=6"),
            "virtual stages need a multiple of the pipeline size",
        ),
        ((f"{TENSOR}=8", f"{PIPELINE}=4"), "16 GPUs do not hold whole replicas"),
        (("train.global_batch_size=6",), "train.global_batch_size=6 does not divide"),
        ((f"{PIPELINE}=4", "model.layer_pattern=M-*", *BF16), "model.layer_pattern has N layers"),
    ],
)
def test_others_are_left_out_for_their_reason(changes: tuple[str, ...], reason: str) -> None:
    """Fails if a layout that cannot be is tried, or left out under another reason."""
    assert reason in (refusal(experiment_with(NANO, *changes), 16) or "")


def test_layouts_go_by_the_layers_that_are_there() -> None:
    """Fails if a Transformer is kept from as many tensor-parallel ranks as it has heads by keys of Mamba layers, which
    nothing reads, or such a layout is left out of the advice."""
    config = experiment_with("stability_830m", f"{TENSOR}=16", "model.mamba_num_groups=3")
    assert refusal(config, 16) is None
    assert [line for line in batch_advice(config, 2048) if line.startswith("with tensor 16 alone: ")]


@pytest.mark.slow
def test_long_samples_are_split_over_context_parallel_ranks() -> None:
    """Fails if 512k tokens are left on one rank, or short samples are split for nothing."""
    found = search_layouts(experiment_with("nemotron_nano_12b_v2_long_context", SHORT), 96, H200)
    assert {8, 16} <= {each.context for each in found.candidates}
    assert {each.context for each in found_on(736).candidates} == {1}


def test_one_long_phase_is_enough_to_split_samples() -> None:
    """Fails if context parallelism is not tried because train.seq_length is short, where a phase has long samples."""
    phases = ("data.phases.1.start_tokens=6_553_600_000", "data.phases.1.seq_length=16384")
    found = found_on(8, SHORT, "train.global_batch_size=8", *phases, "data.phases.2.seq_length=16384")
    assert {each.context for each in found.candidates} > {1}


def test_columns_stay_apart_in_a_short_run() -> None:
    """Fails if two numbers of the table are written as one."""
    found = found_on(1024)
    short = replace(found, candidates=(replace(found.candidates[0], tokens_per_second_per_gpu=22_680, days=0.0001306),))
    header, row = describe_search(short).splitlines()[1:3]
    assert row.split()[-2:] == ["22,680", "0.0001306"]
    assert len(header) == len(row)


def test_programs_get_every_layout() -> None:
    """Fails if JSON and table are not of the same search."""
    found = found_on(1024)
    answer = search_json(found)
    assert len(answer["layouts"]) == len(found.candidates)
    assert answer["layouts"][0]["tokens_per_second_per_gpu"] == found.candidates[0].tokens_per_second_per_gpu
    assert answer["layouts"][0]["recompute"] == "none"
