"""The experiments are the published runs: their sizes, steps, FLOPs, rates, phases and BF16 products.

Oracles are the figures of the papers and model cards, written here by hand.
"""

import functools
import re
from pathlib import Path

import pytest

import recipes
from nemotron_train.config.load import load_config
from nemotron_train.config.schema import PositionEmbedding
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.run_plan import RunPlan, plan_run

# experiment: ranks of a replica, parameters, layers (Mamba, attention, MLP), tokens a step, steps, FLOPs of the run
PUBLISHED = {
    "nemotron_nano_12b_v2": (4, 12.310e9, (28, 6, 28), 6_029_312, 3_317_128, 1.44e24),
    "nemotron_nano_12b_v2_long_context": (128, 12.310e9, (28, 6, 28), 6_291_456, 3_004, None),
    "nemotron_nano_9b_v2": (2, 8.888e9, (27, 4, 25), 6_291_456, 57_220, None),
    "nemotron_h_8b": (2, 8.101e9, (24, 4, 24), 6_291_456, 2_384_185, 6.99e23),
    "nemotron_h_47b": (8, 46.79e9, (45, 5, 48), 6_291_456, 10_013, None),
    "nemotron_h_56b": (6144, 56.32e9, (54, 10, 54), 6_291_456, 3_178_914, 6.77e24),
    "nemotron_t_8b": (2, 8.05e9, (0, 32, 32), 6_291_456, 2_384_185, None),
    "ablation_8b_hybrid": (2, 8.084e9, (24, 4, 24), 6_291_456, 158_945, None),
    "ablation_1b_transformer": (1, 1.292e9, (0, 20, 20), 6_291_456, 158_945, None),
}
T, B = 10**12, 10**9
RATES = {
    "nemotron_nano_12b_v2": {0: 0.0, 4 * B: 2.25e-4, 8 * B: 4.5e-4, 10 * T: 4.5e-4, 16.4 * T: 4.5e-4, 20 * T: 4.5e-6},
    "nemotron_nano_12b_v2_long_context": {0: 4.5e-6, 18 * B: 4.5e-6},
    "nemotron_h_8b": {0: 0.0, 8.3 * B: 8e-4, 15 * T: 8e-6},
    "nemotron_h_56b": {0: 0.0, 25 * B: 4e-4, 10.0125 * T: 2.02e-4, 20 * T: 4e-6},
    "ablation_8b_hybrid": {850 * B: 8e-4, 1 * T: 8e-6},
    "ablation_1b_transformer": {850 * B: 1.2e-3, 1 * T: 1.2e-5},
}
NEMOTRON_H_BLEND = {  # arXiv 2504.03624, figure 4, in percent
    "web_crawl": (59.0, 40.7, 32.7, 13.5), "code": (20.0, 20.0, 20.0, 20.0), "academic": (8.8, 12.0, 12.0, 12.0),
    "multilingual": (5.0, 3.7, 3.7, 3.7), "crawl_plus": (4.0, 7.0, 7.0, 7.0), "math": (2.9, 14.0, 10.8, 10.8),
    "wikipedia": (0.3, 1.7, 1.1, 1.1), "sft_style": (0.0, 0.0, 12.6, 31.8),
}  # fmt: skip


@functools.cache
def planned(experiment: str) -> RunPlan:
    ranks = PUBLISHED[experiment][0] if experiment in PUBLISHED else 1
    return plan_run(load_config([f"experiment={experiment}"]), ranks)


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_sizes_and_steps_are_the_published_ones(experiment: str) -> None:
    """Fails if a recipe drifts from the model or the length of the run that it is named after."""
    _, parameters, layers, tokens_per_step, steps, flops = PUBLISHED[experiment]
    plan = planned(experiment)
    assert plan.sizes.parameters == pytest.approx(parameters, rel=5e-4)
    counts = plan.sizes.num_layers
    assert (counts[LayerKind.mamba], counts[LayerKind.attention], counts[LayerKind.mlp]) == layers
    assert (plan.tokens_per_step, plan.num_steps) == (tokens_per_step, steps)
    if flops is not None:
        assert plan.train_flops == pytest.approx(flops, rel=0.01)


def test_the_830m_has_exactly_its_published_parameters() -> None:
    """Fails if a bias, a LayerNorm's bias or a learned position is lost: counted by hand, and as published."""
    plan = planned("stability_830m")
    hidden, ffn, vocabulary = 1024, 4096, 256_000
    attention = 3 * hidden * hidden + 3 * hidden + hidden * hidden + hidden  # QKV, Proj
    mlp = hidden * ffn + ffn + ffn * hidden + hidden  # FC1, FC2
    norms = (2 * 24 + 1) * 2 * hidden
    assert plan.sizes.parameters == 2 * vocabulary * hidden + 4096 * hidden + 24 * (attention + mlp) + norms
    assert plan.sizes.parameters == 830_793_728
    assert plan.tokens_per_step == 512 * 4096
    assert plan.sizes.num_layers[LayerKind.attention] == plan.sizes.num_layers[LayerKind.mlp] == 24


STABILITY_METHODS = {  # parameters each adds to the 830M: norms of 64 channels and their biases, and of 1,024
    "soft_temp": 0,
    "soft_cap": 0,
    "LayerScale": 48 * 1024,
    "QK_norm": 24 * 2 * 2 * 64,
    "QK_FC_norm": 24 * 2 * 2 * 64 + 48 * 2 * 1024,
    "QKV_norm": 24 * 3 * 2 * 64 - 24 * 2 * 1024,  # in place of the norm before
    "QK_norm_cap": 24 * 2 * 2 * 64,
}


@pytest.mark.parametrize("method", STABILITY_METHODS)
def test_methods_of_the_stability_paper_are_the_overrides_that_the_recipe_names(method: str) -> None:
    """Fails if an override that stability_830m.yaml tells its readers to use is refused, or gives another model."""
    text = (Path(recipes.__file__).parent / "experiment" / "stability_830m.yaml").read_text(encoding="utf-8")
    [overrides] = re.findall(rf"^#   {method} +(.+)$", text, re.MULTILINE)
    plan = plan_run(load_config(["experiment=stability_830m", *overrides.split()]), 8)
    assert plan.sizes.parameters - planned("stability_830m").sizes.parameters == STABILITY_METHODS[method]


@pytest.mark.parametrize("experiment", ["nemotron_t_8b", "ablation_1b_transformer"])
def test_the_transformer_controls_rotate_queries_and_keys(experiment: str) -> None:
    """Fails if a control loses its positions: attention and MLP layers alone cannot tell them."""
    assert planned(experiment).config.model.position_embedding is PositionEmbedding.rope


@pytest.mark.parametrize("experiment", RATES)
def test_rates_are_the_published_ones(experiment: str) -> None:
    """Fails if peak, end, warm-up or decay of a schedule changes."""
    plan = planned(experiment)
    for tokens, rate in RATES[experiment].items():
        assert plan.learning_rate_at(int(tokens)) == pytest.approx(rate, rel=1e-6), tokens


def test_the_12b_decays_over_exactly_the_last_3_6_trillion_tokens() -> None:
    """Fails if the rate falls before 16.4T, or has not begun to fall after it."""
    plan = planned("nemotron_nano_12b_v2")
    assert plan.learning_rate_at(16_400_000_000_000) == 4.5e-4
    assert plan.learning_rate_at(16_410_000_000_000) < 4.5e-4


def test_phases_switch_where_the_papers_say() -> None:
    """Fails if a blend changes at another point of the run."""
    starts = {name: [p.start_tokens for p in planned(name).config.data.phases] for name in PUBLISHED}
    assert starts["nemotron_nano_12b_v2"] == [0, 0.6 * 20 * T, 0.9 * 20 * T]
    assert starts["nemotron_h_56b"] == [0, 0.6 * 20 * T, 0.8 * 20 * T, 20 * T - 380 * B]
    assert starts["nemotron_h_8b"] == [0, 0.6 * 15 * T, 0.8 * 15 * T, 15 * T - 380 * B]


@pytest.mark.parametrize("experiment", ["nemotron_h_56b", "nemotron_h_8b"])
def test_nemotron_h_is_blended_as_published(experiment: str) -> None:
    """Fails if a weight of figure 4 is mistyped, lost or added in any phase."""
    phases = planned(experiment).config.data.phases
    for index, phase in enumerate(phases):
        weights = {weight.source: weight.weight for weight in phase.weights}
        assert weights == {name: row[index] for name, row in NEMOTRON_H_BLEND.items() if row[index]}


def test_the_long_context_blend_is_four_fifths_of_the_third_phase_and_one_fifth_new() -> None:
    """Fails if the two recipes' weights, which are written twice, drift apart."""
    third = {w.source: w.weight for w in planned("nemotron_nano_12b_v2").config.data.phases[2].weights}
    long = {w.source: w.weight for w in planned("nemotron_nano_12b_v2_long_context").config.data.phases[0].weights}
    new = long.pop("long_document_qa")
    assert new / (new + sum(long.values())) == pytest.approx(0.2)
    assert long == pytest.approx({source: 0.8 * weight for source, weight in third.items()})


@pytest.mark.parametrize(
    ("experiment", "first", "last"),
    [
        ("nemotron_nano_12b_v2", (0, 1), (60, 61)),
        ("nemotron_h_56b", (0, 1), (116, 117)),
        ("nemotron_h_47b", (0, 1), (96, 97)),
    ],
)
def test_four_products_at_each_end_stay_in_bf16(experiment: str, first: tuple[int, int], last: tuple[int, int]) -> None:
    """Fails if another product than the first and last four, and the output layer, is kept out of FP8."""
    kept = [gemm.name for gemm in planned(experiment).gemms if not gemm.in_fp8]
    assert kept == [
        f"decoder.layers.{mamba_or_mlp}.{name}"
        for pair in (first, last)
        for mamba_or_mlp, names in zip(
            pair, (("mixer.in_proj", "mixer.out_proj"), ("mlp.linear_fc1", "mlp.linear_fc2")), strict=True
        )
        for name in names
    ] + ["output_layer"]


def test_published_formats() -> None:
    """Fails if a run would compute in another precision than its paper's."""
    formats = {name: planned(name).config.precision.format.value for name in PUBLISHED}
    assert formats["nemotron_nano_12b_v2"] == formats["nemotron_nano_12b_v2_long_context"] == "fp8_block"
    assert formats["nemotron_h_56b"] == formats["nemotron_h_47b"] == "fp8_current"
