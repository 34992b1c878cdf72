"""Does a run whose passes are started as CUDA graphs learn the same bits, and does it start them so?"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nemotron_train.checkpoint.commit import step_folder
from nemotron_train.config.schema import BatchStep, PrecisionFormat, PrimaryWeights, Recompute, RunConfig
from nemotron_train.engine.wrap import zero_gradients
from nemotron_train.step import run_all
from tests.engine.live import live_run, micro_batches, random_samples
from tests.ranks import RankPool
from tests.run.test_gpu_runs import SIZES
from tests.small_runs import logged, small_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

STEPS, STOP, LENGTH = 12, 7, 128
TP2 = dict(tensor_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_parallel_size=2)
# By hand: cut by planned times, which graphs change, layers are on other ranks, and the norm of the gradients is summed
# in another order.
CUTS = {1: "M-*-M", 2: "M-*|-M", 4: "M-|*|-|M"}


def config_of(
    corpus: Path, run_dir: Path, precision: str, parallel: dict[str, Any], *, graphs: bool, **changes: Any
) -> RunConfig:
    """12 steps of 128 tokens a sample, evaluated every fourth; from the sixth on 16 samples a step instead of 8."""
    weights = precision.endswith("_weights")
    step_tokens = 8 * LENGTH
    chunks = parallel.get("pipeline_parallel_size", 1) * parallel.get("virtual_pipeline_size", 1)
    return small_config(
        corpus,
        run_dir,
        model={**SIZES, "layer_pattern": CUTS[chunks], "num_query_groups": 4, "mamba_num_heads": 32},
        parallel=parallel,
        precision={
            "format": PrecisionFormat(precision.removesuffix("_weights")),
            "primary_weights": PrimaryWeights.fp8 if weights else PrimaryWeights.bf16,
        },
        train={
            "train_tokens": 5 * step_tokens + 7 * 2 * step_tokens,
            "seq_length": LENGTH,
            "batch_schedule": [BatchStep(start_tokens=5 * step_tokens, global_batch_size=16)],
            "eval_every_steps": 4,
            "deterministic": True,
            "cuda_graphs": graphs,
            **changes,
        },
    )


def compare(ranks: RankPool, world_size: int, graphed: RunConfig, plain: RunConfig) -> None:
    # Without graphs first: a process that had one computes on another stream than most.
    without, with_it = (ranks.run(train, world_size, config)[0] for config in (plain, graphed))
    for key, number in (("loss", STEPS), ("grad_norm", STEPS), ("eval_loss", 3)):
        found, expected = (logged(key, records) for records in (with_it, without))
        assert len(expected) == number
        assert found == expected, key


@pytest.mark.parametrize(
    ("precision", "world_size", "parallel", "recompute"),
    [
        *((format, 1, {}, Recompute.none) for format in ("fp32", "bf16", "fp8_block", "fp8_current", "fp8_delayed")),
        *((format, 1, {}, Recompute.none) for format in ("fp8_block_weights", "fp8_current_weights")),
        ("fp8_block", 1, {}, Recompute.selective),
        ("bf16", 2, {}, Recompute.none),
        ("fp8_block", 2, {"overlap_grad_reduce": False}, Recompute.none),
        ("fp8_block", 2, TP2, Recompute.none),
        ("fp8_delayed", 2, TP2, Recompute.none),
        ("fp8_current", 2, {**TP2, "overlap_tensor_comm": True}, Recompute.none),
        ("bf16", 2, PP2, Recompute.none),
        ("bf16", 2, {**PP2, "virtual_pipeline_size": 2}, Recompute.none),
        ("fp8_block", 4, {**TP2, **PP2}, Recompute.none),
    ],
)
def test_a_run_learns_the_same_bits(
    ranks: RankPool,
    corpus: Path,
    tmp_path: Path,
    precision: str,
    world_size: int,
    parallel: dict[str, Any],
    recompute: Recompute,
) -> None:
    """Fails if a graph reads what an earlier step left (a batch, the count of tokens, weights in FP8, a scale), adds to
    gradients that it should overwrite, or keeps the batch size of the run's beginning."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    graphed, plain = (
        config_of(corpus, tmp_path / str(graphs), precision, parallel, graphs=graphs, recompute=recompute)
        for graphs in (True, False)
    )
    compare(ranks, world_size, graphed, plain)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_and_two_micro_batches_have_graphs_of_their_own(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if the only micro-batch is taken for the first of several, or the second for one with another after it: the
    two ranks would not add up their gradients."""
    graphed, plain = (
        config_of(corpus, tmp_path / str(graphs), "fp8_block", {}, graphs=graphs, micro_batch_size=4)
        for graphs in (True, False)
    )
    compare(ranks, 2, graphed, plain)


def test_samples_of_another_length_take_another_graph(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if longer samples go through the graph of the shorter ones."""
    configs = []
    for graphs in (True, False):
        config = config_of(corpus, tmp_path / str(graphs), "fp8_block", {}, graphs=graphs, batch_schedule=[])
        first, second = config.data.phases
        second = replace(second, start_tokens=5 * 8 * LENGTH, seq_length=2 * LENGTH)
        configs.append(replace(config, data=replace(config.data, phases=[first, second])))
    compare(ranks, 1, *configs)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stopped_run_goes_on(ranks: RankPool, corpus: Path, tmp_path: Path, asynchronous: bool) -> None:
    """Fails if what is saved or loaded is not what the graph works on, or a later step changes what is being saved."""
    stopped, whole = (
        config_of(corpus, tmp_path / str(graphs), "fp8_delayed", {}, graphs=graphs, eval_every_steps=0)
        for graphs in (True, False)
    )
    saving = replace(stopped.checkpoint, asynchronous=asynchronous, every_steps=STOP - 1)
    stopped = replace(stopped, checkpoint=saving)
    ranks.run(train, 1, stopped, STOP)
    # The save before the stop went on while the last step trained, if it was asynchronous.
    checkpoints = Path(stopped.run.dir) / "checkpoints"
    shutil.rmtree(step_folder(checkpoints, STOP))
    assert step_folder(checkpoints, STOP - 1).exists()
    expected, found = (logged("loss", ranks.run(train, 1, config)[0]) for config in (whole, stopped))
    assert len(expected) == STEPS
    assert found == expected


def started_by_the_cpu(config: RunConfig) -> int:
    """Count what the CPU starts on the GPU during the passes of a step, after two that it prepares with."""
    with live_run(config) as run:
        for _ in range(3):
            zero_gradients(run.chunks)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                run_all(run, micro_batches(random_samples(0, 8, config), 2), forward_only=False)
                torch.cuda.synchronize()
        return sum("Launch" in event.name for event in seen.events() if event.name.startswith("cu"))


def test_passes_are_started_at_once(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a step's kernels are still started one by one."""
    without, with_it = (
        ranks.run(started_by_the_cpu, 1, config_of(corpus, tmp_path, "fp8_block", {}, graphs=graphs))[0]
        for graphs in (False, True)
    )
    assert with_it < 100 < 500 < without
