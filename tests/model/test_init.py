"""Do the first weights follow from seed and name alone, whatever the layout, and have the ranges that the papers give
them?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.schema import Initialization, ModelSection, Norm, PositionEmbedding, QkvNorm, RunConfig
from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.engine.mcore_config import build_transformer_config
from nemotron_train.model.build import build_model_chunks
from nemotron_train.model.init import take_shard
from nemotron_train.model.names import rule_for
from nemotron_train.ops.implementations import operations
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.ranks import launched_rank
from tests.engine.live import Arrays, live_groups, to_array
from tests.model.whole import join_ranks
from tests.ranks import RankPool
from tests.small_runs import small_config

TP2_PP2 = dict(tensor_parallel_size=2, pipeline_parallel_size=2)


def config_with(parallel: dict[str, Any] | None = None, seed: int = 5, **model: Any) -> RunConfig:
    return small_config(Path("unused"), Path("unused"), model=model, parallel=parallel or {}, run={"seed": seed})


def first_weights(configs: dict[str, RunConfig]) -> dict[str, Arrays]:
    """What this rank holds before any step, for several configurations of one layout."""
    with live_groups(next(iter(configs.values()))) as (platform, groups):
        weights = {}
        for key, config in configs.items():
            plan, ops = plan_run(config, launched_rank().world_size), operations("torch")
            parts = choose_layer_parts(plan, platform)
            chunks = build_model_chunks(plan, build_transformer_config(plan, ops, parts), parts, ops, groups)
            weights[key] = {
                name: to_array(parameter) for chunk in chunks for name, parameter in chunk.named_parameters()
            }
        return weights


GPT: dict[str, Any] = dict(
    layer_pattern="*-*-", norm=Norm.layer, linear_bias=True, position_embedding=PositionEmbedding.learned,
    max_position_embeddings=32, qkv_norm=QkvNorm.qk, output_norm=True, layer_scale=0.125,
)  # fmt: skip
ALONE = {
    "plain": config_with(),
    "tied": config_with(tied_embeddings=True),
    "other seed": config_with(seed=6),
    "gpt": config_with(initialization=Initialization.gpt),
    "wide": config_with(init_std=0.5),
    "many heads": config_with(mamba_num_heads=512, mamba_head_dim=2),
    "gpt parts": config_with(**GPT),
}
SPLIT = {
    "plain": config_with(TP2_PP2),
    "tied": config_with(TP2_PP2, tied_embeddings=True),
    "gpt parts": config_with(TP2_PP2, **GPT),
}


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, Arrays]:
    return ranks.run(first_weights, 1, ALONE)[0]


@pytest.fixture(scope="module")
def split(ranks: RankPool) -> list[dict[str, Arrays]]:
    return ranks.run(first_weights, 4, SPLIT)


@pytest.mark.parametrize("key", ["plain", "gpt parts"])
def test_ranks_hold_slices_of_the_weights_of_one_rank(
    alone: dict[str, Arrays], split: list[dict[str, Arrays]], key: str
) -> None:
    """Fails if a rank draws its own numbers, or takes other rows of a packed parameter than its heads and groups
    need."""
    model = ALONE[key].model
    joined = join_ranks([rank[key] for rank in split], 2, model)
    assert joined.keys() == alone[key].keys()
    for name, whole in alone[key].items():
        assert np.array_equal(joined[name], whole), name
        for rank, weights in enumerate(split):
            if name in weights[key]:
                part = take_shard(torch.from_numpy(whole), rule_for(name), model, rank % 2, 2).numpy()
                assert np.array_equal(part, weights[key][name]), (name, rank)


def test_every_parameter_is_on_one_pipeline_stage(split: list[dict[str, Arrays]]) -> None:
    """Fails if two stages hold a layer, or none does."""
    first, last = set(split[0]["plain"]), set(split[2]["plain"])
    assert not first & last
    assert "embedding.word_embeddings.weight" in first
    assert {"decoder.final_norm.weight", "output_layer.weight"} <= last
    assert {name.split(".")[2] for name in first | last if "layers" in name} == set("01234567")


def test_packed_rows_go_part_by_part() -> None:
    """Fails if the rows of z, x, B, C and dt of a rank are not the halves of each, counted by hand."""
    model = ModelSection(mamba_num_heads=4, mamba_head_dim=2, mamba_num_groups=2, mamba_state_dim=3)
    rows = torch.arange(8 + 8 + 6 + 6 + 4)
    second = take_shard(rows, rule_for("decoder.layers.0.mixer.in_proj.weight"), model, 1, 2)
    assert second.tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 19, 20, 21, 25, 26, 27, 30, 31]


def test_a_tied_head_starts_as_the_embedding(alone: dict[str, Arrays], split: list[dict[str, Arrays]]) -> None:
    """Fails if the copy of the embedding on the last stage starts with other numbers."""
    for rank in (0, 1):
        embedding, head = (
            split[rank]["tied"]["embedding.word_embeddings.weight"],
            split[rank + 2]["tied"]["output_layer.weight"],
        )
        assert np.array_equal(embedding, head)
    assert "output_layer.weight" not in alone["tied"]
    assert not np.array_equal(alone["plain"]["embedding.word_embeddings.weight"], alone["plain"]["output_layer.weight"])


def test_norms_biases_and_scales_start_where_they_do_nothing(alone: dict[str, Arrays]) -> None:
    """Fails if a bias does not start at 0, a norm at 1, a layer's scale at model.layer_scale, or positions start like
    nothing that is learned."""
    for name, array in alone["gpt parts"].items():
        if name.endswith("layer_scale"):
            assert np.all(array == 0.125), name
        elif array.ndim == 1:
            assert np.all(array == (0 if name.endswith("bias") else 1)), name
    positions = alone["gpt parts"]["embedding.position_embeddings.weight"]
    assert positions.shape == (32, 32)
    assert positions.std() == pytest.approx(0.02, rel=0.08)


def test_another_seed_gives_other_weights(alone: dict[str, Arrays]) -> None:
    """Fails if run.seed does not reach a parameter that is drawn, or two parameters of one shape start alike."""
    plain, other = alone["plain"], alone["other seed"]
    starts_at_one = ("mixer.D", "norm.weight", "layer_norm_weight")
    for name in plain:
        assert np.array_equal(plain[name], other[name]) == name.endswith(starts_at_one), name
        assert np.all(plain[name] == 1) == name.endswith(starts_at_one), name
    assert not np.array_equal(
        plain["decoder.layers.0.mixer.in_proj.weight"], plain["decoder.layers.2.mixer.in_proj.weight"]
    )


@pytest.mark.parametrize(
    ("key", "std", "residual_std"),
    [("plain", 0.02, 0.02 / 8**0.5), ("gpt", 0.02, 0.02 / 16**0.5), ("wide", 0.5, 0.5 / 8**0.5)],
)
def test_matrices_have_the_standard_deviation_that_was_asked_for(
    alone: dict[str, Arrays], key: str, std: float, residual_std: float
) -> None:
    """Fails if projections to the residual stream are scaled by another depth (8 layers here), or init_std is
    ignored."""
    weights = alone[key]
    residual = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")
    others = (
        "in_proj.weight",
        "linear_qkv.weight",
        "linear_fc1.weight",
        "word_embeddings.weight",
        "output_layer.weight",
    )
    for endings, expected in ((residual, residual_std), (others, std)):
        for ending in endings:
            values = np.concatenate([array.ravel() for name, array in weights.items() if name.endswith(ending)])
            assert values.std() == pytest.approx(expected, rel=0.08), (
                ending
            )  # 1024 values at least: 3.5 standard errors
            assert abs(values.mean()) < 4 * expected / values.size**0.5, ending


def test_decay_rates_and_step_sizes_fill_their_ranges(alone: dict[str, Arrays]) -> None:
    """Fails if -A starts outside 1 to 16, or a step size outside 0.001 to 0.1, or not spread (512 heads x 4 layers) as
    Mamba-2 asks."""
    weights = alone["many heads"]
    a = np.exp(np.concatenate([array for name, array in weights.items() if name.endswith("A_log")]))
    dt_bias = np.concatenate([array for name, array in weights.items() if name.endswith("dt_bias")])
    dt = np.log1p(np.exp(dt_bias.astype(np.float64)))
    assert a.size == dt.size == 2048
    assert (a.min(), a.max()) == pytest.approx((1.0, 16.0), abs=0.1)
    assert a.mean() == pytest.approx(8.5, abs=0.4)  # uniform
    assert 1e-3 * (1 - 1e-4) <= dt.min() < 1.02e-3
    assert 0.098 < dt.max() <= 0.1 * (1 + 1e-4)
    assert np.median(dt) == pytest.approx(1e-2, rel=0.15)  # uniform in the logarithm
    conv = np.concatenate([array.ravel() for name, array in weights.items() if "conv1d" in name])
    assert (conv.min(), conv.max()) == pytest.approx((-0.5, 0.5), abs=1e-3)  # 1 / sqrt(4 taps)
