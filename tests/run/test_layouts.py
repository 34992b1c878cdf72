"""The same model learns the same thing under every parallel layout, precision aside to the last float32 digits."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.config.schema import BatchStep, Norm, PositionEmbedding, PrecisionFormat, QkvNorm, Recompute
from tests.ranks import RankPool
from tests.small_runs import small_config, train

TP2 = {"tensor_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel_size": 2}
CP2 = {"context_parallel_size": 2}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, TP2),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "pp2": (2, PP2),
    "dp2": (2, {}),
    "dp2_overlapped_gather": (2, {"overlap_param_gather": True}),
    "dp2_nothing_overlapped": (2, {"overlap_grad_reduce": False}),
    "pp2_vpp2": (2, {**PP2, "virtual_pipeline_size": 2}),
    "tp2_pp2": (4, {**TP2, **PP2}),
    "tp2_dp2": (4, TP2),
    "pp4": (4, {"pipeline_parallel_size": 4}),
    "cp2": (2, CP2),
    "cp2_tp2_sp": (4, {**CP2, **TP2}),
    "cp2_pp2": (4, {**CP2, **PP2}),
    "cp2_dp2": (4, CP2),
    "cp4": (4, {"context_parallel_size": 4}),
}

# Not 2: ranks on few cores spend their time on exchanges, of which larger micro-batches need fewer.
MICRO_BATCH = {"tp2_sp": 4, "tp2": 4, "tp2_pp2": 4, "cp2_tp2_sp": 8, "cp2_pp2": 4, "cp2_dp2": 4, "cp4": 8}
WITH_MICRO_BATCH_1 = ("tp2_sp", "pp2", "dp2", "pp2_vpp2", "tp2_pp2", "tp2_dp2", "pp4")

Curve = tuple[list[float], list[float]]


class Runs:
    """Trains 20 steps once per configuration and remembers the curve."""

    def __init__(self, ranks: RankPool, corpus: Path, folder: Path) -> None:
        self._ranks, self._corpus, self._folder, self._count = ranks, corpus, folder, 0
        self.curve = cache(self._curve)

    def _curve(
        self,
        world_size: int,
        layout: tuple[tuple[str, Any], ...],
        micro_batch_size: int,
        changes: tuple[tuple[str, str, Any], ...] = (),
    ) -> Curve:
        self._count += 1
        sections: dict[str, dict[str, Any]] = {
            "parallel": dict(layout),
            "train": {"micro_batch_size": micro_batch_size},
        }
        for section, key, value in changes:
            sections.setdefault(section, {})[key] = value
        config = small_config(self._corpus, self._folder / f"run{self._count}", **sections)
        records = [record for record in self._ranks.run(train, world_size, config)[0] if "loss" in record]
        return [record["loss"] for record in records], [record["grad_norm"] for record in records]


@pytest.fixture(scope="module")
def runs(ranks: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, corpus, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize(
    ("name", "micro_batch_size"),
    [
        *((name, MICRO_BATCH.get(name, 2)) for name in LAYOUTS),
        *(
            pytest.param(name, 1, marks=() if name in ("dp2", "pp2") else pytest.mark.slow)
            for name in WITH_MICRO_BATCH_1
        ),
    ],
)
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(runs: Runs, name: str, micro_batch_size: int) -> None:
    """Fails if a layout drops, doubles or reorders a head, a layer, a gradient or a token."""
    world_size, layout = LAYOUTS[name]
    losses, norms = runs.curve(world_size, tuple(layout.items()), micro_batch_size)
    alone_losses, alone_norms = runs.curve(1, (), 2)
    assert len(losses) == 20
    assert losses == pytest.approx(alone_losses, rel=1e-5)
    assert norms == pytest.approx(alone_norms, rel=1e-4)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", ["tp2_sp", "pp2", "cp2"])
def test_bf16_follows_the_one_rank_run(runs: Runs, name: str) -> None:
    """Fails if a bf16 layout goes another way than rounding explains: 2 % of the loss at any of 20 steps."""
    world_size, layout = LAYOUTS[name]
    bf16 = (("precision", "format", PrecisionFormat.bf16),)
    losses, _ = runs.curve(world_size, tuple(layout.items()), MICRO_BATCH.get(name, 2), bf16)
    alone, _ = runs.curve(1, (), 2, bf16)
    in_fp32, _ = runs.curve(1, (), 2)
    assert losses == pytest.approx(alone, rel=2e-2)
    assert alone == pytest.approx(in_fp32, rel=2e-2)
    assert alone != in_fp32, "bf16 must not silently be fp32"


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("alone", Recompute.selective),
        ("alone", Recompute.full),
        ("tp2_sp", Recompute.full),
        pytest.param("tp2_sp", Recompute.selective, marks=pytest.mark.slow),
    ],
)
def test_recomputing_activations_changes_nothing(runs: Runs, name: str, recompute: Recompute) -> None:
    """Fails if a recomputed forward pass differs from the first one, or loses a gradient."""
    world_size, layout = LAYOUTS.get(name, (1, {}))
    run = world_size, tuple(layout.items()), MICRO_BATCH.get(name, 2)
    assert runs.curve(*run, (("train", "recompute", recompute),)) == runs.curve(*run)


def test_a_tied_head_is_one_weight_on_two_pipeline_stages(runs: Runs) -> None:
    """Fails if the embedding and its copy on the last stage drift apart, or their gradients are not added."""
    tied = (("model", "tied_embeddings", True),)
    losses, norms = runs.curve(2, tuple(PP2.items()), 2, tied)
    alone_losses, alone_norms = runs.curve(1, (), 2, tied)
    assert losses == pytest.approx(alone_losses, rel=1e-5)
    assert norms == pytest.approx(alone_norms, rel=1e-4)


def test_cutting_the_pipeline_by_hand_changes_nothing(runs: Runs) -> None:
    """Fails if `|` moves a layer to another place in the model."""
    by_hand = (("model", "layer_pattern", "M-M*|-M-M"),)
    losses, _ = runs.curve(2, tuple(PP2.items()), 2, by_hand)
    assert losses == pytest.approx(runs.curve(1, (), 2)[0], rel=1e-5)


def test_the_batch_grows_with_the_tokens(runs: Runs) -> None:
    """Fails if train.batch_schedule is ignored, or counts tokens wrongly: 4 steps of 8 samples, then 8 steps of 16."""
    losses, _ = runs.curve(2, (), 2, (("train", "batch_schedule", (BatchStep(4 * 8 * 32, 16),)),))
    assert len(losses) == 4 + 8
    assert losses[:4] == pytest.approx(runs.curve(1, (), 2)[0][:4], rel=1e-5)


GPT = (
    ("model", "layer_pattern", "*-*-*-*-"),
    ("model", "norm", Norm.layer),
    ("model", "linear_bias", True),
    ("model", "position_embedding", PositionEmbedding.learned),
    ("model", "max_position_embeddings", 40),
    ("model", "qkv_norm", QkvNorm.qk),
    ("model", "attention_logit_cap", 5.0),
)
ROPE = (("model", "layer_pattern", "*-*-*-*-"), ("model", "position_embedding", PositionEmbedding.rope))


@pytest.mark.parametrize("model", [GPT, ROPE], ids=["gpt", "rope"])
@pytest.mark.parametrize(
    "name", ["tp2_sp", "tp2", "pp2", "cp2", "dp2", pytest.param("tp2_pp2", marks=pytest.mark.slow)]
)
def test_transformers_do_not_depend_on_the_layout(
    runs: Runs, name: str, model: tuple[tuple[str, str, Any], ...]
) -> None:
    """Fails if a bias, a position or a norm drifts apart between ranks, or its gradient is lost, in 20 steps."""
    world_size, layout = LAYOUTS[name]
    losses, norms = runs.curve(world_size, tuple(layout.items()), MICRO_BATCH.get(name, 2), model)
    alone_losses, alone_norms = runs.curve(1, (), 2, model)
    assert losses == pytest.approx(alone_losses, rel=1e-5)
    assert norms == pytest.approx(alone_norms, rel=1e-4)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("model", [GPT, ROPE], ids=["gpt", "rope"])
def test_transformers_in_bf16_follow_those_in_fp32(runs: Runs, model: tuple[tuple[str, str, Any], ...]) -> None:
    """Fails if a part computes in bf16 what must not be, or keeps its weights in float32: 2 % of the loss."""
    bf16 = (*model, ("precision", "format", PrecisionFormat.bf16))
    losses, _ = runs.curve(2, tuple(TP2.items()), MICRO_BATCH["tp2_sp"], bf16)
    in_fp32, _ = runs.curve(1, (), 2, model)
    assert losses == pytest.approx(in_fp32, rel=2e-2)
    assert losses != in_fp32
