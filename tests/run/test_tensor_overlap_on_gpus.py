"""Do tensor-parallel ranks that exchange activations while products run learn what others do, and does that happen?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nemotron_train.config.schema import PrecisionFormat, Recompute, RunConfig
from nemotron_train.engine.wrap import zero_gradients
from nemotron_train.step import run_all
from tests.engine.live import Arrays, gradients_of, live_run, micro_batches, random_samples
from tests.ranks import RankPool
from tests.run.test_gpu_runs import SIZES
from tests.small_runs import logged, small_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

STEPS, STOP = 12, 5
TP2, TP4 = (dict(tensor_parallel_size=size, sequence_parallel=True) for size in (2, 4))
# Per layer: forward its input is gathered and its output scattered; backward the gradient of the output is gathered,
# the input once more, and the gradient of the input scattered.
EXCHANGES_OF_A_LAYER = 5


def config_of(
    corpus: Path, run_dir: Path, precision: str, parallel: dict[str, Any], *, overlap: bool, **changes: Any
) -> RunConfig:
    """12 steps of 8 samples of 128 tokens, evaluated twice. On two ranks the first of five FP8 layers stays in
    bfloat16, so that there are buffers of both types; on four none does."""
    bf16_layers = 1 if precision == "fp8_current" and parallel is TP2 else 0
    return small_config(
        corpus,
        run_dir,
        steps=4 * STEPS,
        model={**SIZES, "num_query_groups": 4, "mamba_num_heads": 64},  # FP8 takes a quarter's rows
        parallel={**parallel, "overlap_tensor_comm": overlap},
        precision={"format": PrecisionFormat(precision), "bf16_first_layers": bf16_layers},
        train={"seq_length": 128, "eval_every_steps": 6, **changes},
    )


@pytest.mark.parametrize(
    ("precision", "world_size", "parallel", "recompute"),
    [
        ("bf16", 2, TP2, Recompute.none),
        ("bf16", 2, TP2, Recompute.full),
        ("fp8_current", 2, TP2, Recompute.none),
        ("fp8_delayed", 2, TP2, Recompute.none),
        ("bf16", 4, TP2, Recompute.none),
        ("bf16", 4, {**TP2, "pipeline_parallel_size": 2}, Recompute.none),
        ("bf16", 4, {**TP2, "context_parallel_size": 2}, Recompute.none),
        ("fp8_current", 4, TP4, Recompute.none),
    ],
)
def test_losses_are_those_without_it(
    ranks: RankPool,
    corpus: Path,
    tmp_path: Path,
    precision: str,
    world_size: int,
    parallel: dict[str, Any],
    recompute: Recompute,
) -> None:
    """Fails if a piece lands elsewhere, is read before it is there, or a buffer has the size of other tokens."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    with_it, without = (
        ranks.run(
            train,
            world_size,
            config_of(corpus, tmp_path / str(overlap), precision, parallel, overlap=overlap, recompute=recompute),
        )[0]
        for overlap in (True, False)
    )
    # Two ranks' parts add up to the same in any order; of four, another order is another rounding, which steps enlarge.
    near = 2e-3 if parallel["tensor_parallel_size"] == 2 else 1e-2
    for key, number in (("loss", STEPS), ("eval_loss", 2)):
        found, expected = (logged(key, records) for records in (with_it, without))
        assert len(found) == number
        assert found == pytest.approx(expected, rel=near)


def test_a_stopped_run_goes_on_bitwise(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if pieces are summed in the order in which they happen to come."""
    straight, stopped = (
        config_of(corpus, tmp_path / name, "fp8_current", TP2, overlap=True, deterministic=True, eval_every_steps=STOP)
        for name in ("straight", "stopped")
    )
    ranks.run(train, 2, stopped, STOP)
    gone_on, whole = (logged("loss", ranks.run(train, 2, config)[0]) for config in (stopped, straight))
    assert len(whole) == STEPS
    assert gone_on == whole


def gradients_of_last_pass(config: RunConfig) -> Arrays:
    """Of one pass: after earlier ones, whose pieces a buffer still holds."""
    with live_run(config) as run:
        for seed in range(3):
            zero_gradients(run.chunks)
            run_all(run, micro_batches(random_samples(seed, 8, config), 2), forward_only=False)
        return gradients_of(run)


@pytest.mark.parametrize("precision", ["bf16", "fp8_current", "fp8_delayed"])
def test_gradients_are_those_without_it(ranks: RankPool, corpus: Path, tmp_path: Path, precision: str) -> None:
    """Fails if a piece is missing, doubled or of another pass; each tensor of each rank counts by itself. In FP8 one
    rounding elsewhere moves gradients further than this, so nearly all must be the same."""
    with_it, without = (
        ranks.run(gradients_of_last_pass, 2, config_of(corpus, tmp_path, precision, TP2, overlap=overlap))
        for overlap in (True, False)
    )
    for rank, (found, expected) in enumerate(zip(with_it, without, strict=True)):
        for name, gradient in expected.items():
            error = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
            assert error < 2e-2, (rank, name, error)


def exchanges(config: RunConfig) -> int:
    """The gathers and scatters of one forward and backward pass that go through NCCL."""
    with live_run(config) as run:
        batches = micro_batches(random_samples(0, 2, config), 2)
        run_all(run, batches, forward_only=False)  # autotuning
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run_all(run, batches, forward_only=False)
            torch.cuda.synchronize()
        return sum("AllGather" in event.name or "ReduceScatter" in event.name for event in seen.events())


@pytest.mark.parametrize("precision", ["bf16", "fp8_current", "fp8_delayed"])
def test_layers_exchange_through_user_buffers(ranks: RankPool, corpus: Path, tmp_path: Path, precision: str) -> None:
    """Fails if a layer still waits for NCCL: the option would then do nothing for it."""
    with_it, without = (
        ranks.run(exchanges, 2, config_of(corpus, tmp_path, precision, TP2, overlap=overlap))[0]
        for overlap in (True, False)
    )
    assert without - with_it == EXCHANGES_OF_A_LAYER * len(SIZES["layer_pattern"])
