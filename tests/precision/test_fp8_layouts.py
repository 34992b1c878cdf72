"""What does a parallel layout change about emulated FP8? The oracle is the same model on one rank.

A pipeline changes nothing, and data parallelism nothing for scales that follow from a micro-batch alone. Delayed
scaling has the maxima of all ranks of a step: the same scales for the same samples at once, whoever takes them.
Context parallelism gives each rank other blocks of tokens, and maxima, to quantise by. Tensor parallelism rounds sums
of partial results to bfloat16 once more, as without FP8; its weights are quantised shard by shard, so fp8_current takes
the maximum of a shard, and blocks begin anew with each shard.
"""

from pathlib import Path
from typing import Any

import pytest

from nemotron_train.config.schema import Norm, PositionEmbedding, PrecisionFormat, QkvNorm, Recompute
from nemotron_train.data.batch import take_part
from nemotron_train.data.sequence_part import SequencePart
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.step import run_all, train_step
from nemotron_train.trainer import build_runtime
from tests.engine.live import gradients_of, live_groups, micro_batches, random_samples
from tests.precision.small_fp8 import BATCH, FORMATS, SEQ, TP2_SP, fp8_config
from tests.ranks import RankPool

STEPS = 3  # the first with a rate of 0, so that the second has the same weights

Losses = dict[PrecisionFormat, list[float]]


def take_steps(folder: Path, micro_batch_size: int, sections: dict[str, Any]) -> Losses:
    """Train the same model in every FP8 format, one after the other on the same process groups."""
    losses = {}
    train = {"micro_batch_size": micro_batch_size, **sections.pop("train", {})}
    configs = {format: fp8_config(folder, folder, format, steps=STEPS, train=train, **sections) for format in FORMATS}
    with live_groups(configs[FORMATS[0]]) as (platform, groups):
        for format, config in configs.items():
            run = build_runtime(plan_run(config, launched_rank().world_size), platform, groups)
            part = SequencePart(groups.cp.rank(), groups.cp.size())
            samples = [take_part(random_samples(step, BATCH, config), part) for step in range(STEPS)]
            batches = [micro_batches(s, micro_batch_size, groups.dp.rank(), groups.dp.size()) for s in samples]
            results = [train_step(run, batch, step * SEQ * BATCH) for step, batch in enumerate(batches)]
            losses[format] = [result.loss.loss for result in results]
    return losses


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    return ranks.run(take_steps, 1, tmp_path_factory.mktemp("alone"), 2, {})[0]


@pytest.mark.parametrize("virtual", [1, 2])
def test_a_pipeline_changes_nothing(ranks: RankPool, tmp_path: Path, alone: Losses, virtual: int) -> None:
    """Fails if a stage's scales depend on how many layers are on other ranks, or on the order of micro-batches, or if
    gathering the weights of a chunk mixes those in bfloat16 with those in float32."""
    parallel = {"pipeline_parallel_size": 2, "virtual_pipeline_size": virtual}
    losses = ranks.run(take_steps, 2, tmp_path, 2, {"parallel": parallel})[0]
    for format in FORMATS:
        assert losses[format] == pytest.approx(alone[format], rel=1e-6), format


@pytest.mark.parametrize("parallel", [TP2_SP, {"context_parallel_size": 2}], ids=["tp2_sp", "cp2"])
def test_splitting_a_sample_changes_what_it_changes_without_fp8(
    ranks: RankPool, tmp_path: Path, alone: Losses, parallel: dict[str, Any]
) -> None:
    """Fails if a rank quantises another part of the sequence or of the weights than it multiplies."""
    losses = ranks.run(take_steps, 2, tmp_path, 2, {"parallel": parallel})[0]
    for format in FORMATS:
        assert losses[format] == pytest.approx(alone[format], rel=2e-3), format


def test_data_parallelism_changes_nothing_for_the_same_micro_batches(
    ranks: RankPool, tmp_path: Path, alone: Losses
) -> None:
    """Fails if scales of a micro-batch depend on other ranks where the recipe says they do not."""
    losses = ranks.run(take_steps, 2, tmp_path, 2, {})[0]
    for format in (PrecisionFormat.fp8_block, PrecisionFormat.fp8_current):
        assert losses[format] == pytest.approx(alone[format], rel=1e-6), format


def test_delayed_scaling_has_the_maxima_of_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if maxima are not reduced over the data-parallel ranks: the four samples of a step on one rank, or two each
    on two."""
    together = ranks.run(take_steps, 1, tmp_path, 4, {})[0][PrecisionFormat.fp8_delayed]
    apart = ranks.run(take_steps, 2, tmp_path, 2, {})[0][PrecisionFormat.fp8_delayed]
    assert apart[:2] == pytest.approx(together[:2], rel=1e-6)
    assert apart == pytest.approx(together, rel=1e-3)


def test_computing_layers_again_changes_nothing(ranks: RankPool, tmp_path: Path, alone: Losses) -> None:
    """Fails if a layer that is computed again is not in FP8, or has other scales than the first time."""
    losses = ranks.run(take_steps, 1, tmp_path, 2, {"train": {"recompute": Recompute.full}})[0]
    assert losses == alone


GPT: dict[str, Any] = dict(
    layer_pattern="*-*-", norm=Norm.layer, linear_bias=True, position_embedding=PositionEmbedding.learned,
    max_position_embeddings=SEQ, qkv_norm=QkvNorm.qkv,
)  # fmt: skip


def test_biases_and_norms_are_split_as_without_fp8(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if norms of queries, keys and values are quantised, or split, otherwise than on one rank."""
    alone = ranks.run(take_steps, 1, tmp_path, 2, {"model": GPT})[0]
    split = ranks.run(take_steps, 2, tmp_path, 2, {"model": GPT, "parallel": TP2_SP})[0]
    for format in FORMATS:
        assert split[format] == pytest.approx(alone[format], rel=2e-3), format


def parameters_without_gradient(folder: Path) -> list[tuple[PrecisionFormat, str]]:
    found = []
    configs = {format: fp8_config(folder, folder, format, steps=STEPS, model=GPT) for format in FORMATS}
    with live_groups(configs[FORMATS[0]]) as (platform, groups):
        for format, config in configs.items():
            run = build_runtime(plan_run(config, 1), platform, groups)
            run_all(run, micro_batches(random_samples(0, BATCH, config), 2), forward_only=False)
            found += [(format, name) for name, gradient in gradients_of(run).items() if not gradient.any()]
    return found


def test_every_parameter_takes_part_in_fp8(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a layer drops its bias where it computes in FP8."""
    assert ranks.run(parameters_without_gradient, 1, tmp_path)[0] == []
