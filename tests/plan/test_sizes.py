"""Parameters and FLOPs, against the papers and against independent implementations."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.new_run import parameter_shapes
from nemotron_train.plan.pattern import LayerKind, parse_pattern
from nemotron_train.plan.sizes import ModelSizes, count_model
from tests.plan.small import plan_of

# model: billions of parameters as published or counted from the released weights, layers (Mamba, attention, MLP)
PUBLISHED = {
    "nemotron_nano_12b_v2": (12.310, (28, 6, 28)),
    "nemotron_nano_9b_v2": (8.888, (27, 4, 25)),
    "nemotron_h_8b": (8.101, (24, 4, 24)),
    "nemotron_h_47b": (46.79, (45, 5, 48)),
    "nemotron_h_56b": (56.32, (54, 10, 54)),
}


def sizes_of(name: str, *overrides: str) -> ModelSizes:
    return plan_of(f"model={name}", "train.micro_batch_size=1", *overrides).sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    """Fails if a recipe or a closed form loses a layer, a group or a norm."""
    billions, layers = PUBLISHED[name]
    sizes = sizes_of(name)
    assert sizes.parameters / 1e9 == pytest.approx(billions, abs=0.5 * 10 ** -len(str(billions).split(".")[1]))
    assert tuple(sizes.num_layers[kind] for kind in (LayerKind.mamba, LayerKind.attention, LayerKind.mlp)) == layers


@pytest.mark.parametrize("name", ["nemotron_nano_9b_v2", "nemotron_h_56b", "quickstart"])
def test_parameters_are_those_of_hugging_face_nemotron_h(name: str) -> None:
    """Fails if any one tensor is missing or has another shape: counted layer by layer on the meta device."""
    plan = plan_of(f"model={name}", "model.mamba_conv_kernel=3")
    model = plan.config.model
    with torch.device("meta"):
        theirs = NemotronHForCausalLM(
            NemotronHConfig(
                hybrid_override_pattern="M*-", num_hidden_layers=3, hidden_size=model.hidden_size,
                intermediate_size=model.ffn_hidden_size, num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.num_query_groups, head_dim=model.attention_head_dim,
                mamba_num_heads=model.mamba_num_heads, mamba_head_dim=model.mamba_head_dim,
                n_groups=model.mamba_num_groups, ssm_state_size=model.mamba_state_dim, conv_kernel=3,
                vocab_size=model.vocab_size,
            )
        )  # fmt: skip

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    for layer, kind in zip(theirs.model.layers, (LayerKind.mamba, LayerKind.attention, LayerKind.mlp), strict=True):
        assert plan.sizes.layer_parameters[kind] == count(layer), kind
    assert count_model(model, parse_pattern("M*-"), 8).parameters == count(theirs)


@pytest.mark.parametrize("name", ["stability_830m", "nemotron_t_8b"])
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.qkv_norm=qk", "model.norm=layer"],
        ["model.qkv_norm=qk", "model.norm=rms", "model.output_norm=true"],
        ["model.qkv_norm=qkv", "model.output_norm=true", "model.layer_scale=0.1"],
        ["model.layer_pattern='M*-'", "model.linear_bias=false", "model.layer_scale=0.1", "model.norm=layer"],
    ],
    ids=" ".join,
)
def test_parameters_are_those_of_the_definition(name: str, changes: list[str]) -> None:
    """Fails if a closed form loses a part that the definition (on the meta device) has, or has one too many."""
    plan = plan_of(f"model={name}", "train.micro_batch_size=1", *changes)
    assert plan.sizes.parameters == sum(map(math.prod, parameter_shapes(plan.config.model).values()))


def test_a_tied_head_has_no_weights_of_its_own_and_the_same_flops() -> None:
    """Fails if tying does not save exactly the head's weights, or is taken to save its product."""
    untied, tied = sizes_of("quickstart"), sizes_of("quickstart", "model.tied_embeddings=true")
    assert untied.parameters - tied.parameters == 2048 * 128
    assert untied.flops_per_token == tied.flops_per_token


def test_flops_of_the_12b_are_those_of_its_weights_attention_and_scan() -> None:
    """Fails if a term is lost. Written out from the shapes: 6 FLOPs a weight that multiplies, half of the attention
    square, and within a chunk the two products of the scan, plus writing and reading the state."""
    seq_length = 8192
    mamba, attention, mlp = (
        5120 * (20480 + 2048 + 128) + 10240 * 5120,
        5120 * (56 * 128) + 5120 * 5120,
        2 * 5120 * 20480,
    )
    weights = 28 * mamba + 6 * attention + 28 * mlp + 131072 * 5120
    square = 6 * 3 * (2 * 2 * seq_length * 40 * 128) / 2
    scan = 28 * 3 * (128 * 128 * 8 + 128 * 80 * 128 + 4 * 128 * 80 * 128)
    sizes = sizes_of("nemotron_nano_12b_v2", "train.seq_length=8192", "train.eval_tokens=8192")
    assert sizes.flops_per_token == 6 * weights + square + scan


def test_flops_count_every_matrix_product_of_torch() -> None:
    """Fails if a projection is forgotten: torch counts what it multiplies in an attention and an MLP layer."""
    model = ModelSection(
        layer_pattern="*-", hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
        attention_head_dim=8, mamba_num_heads=4, mamba_head_dim=16, mamba_num_groups=2, mamba_state_dim=8,
        vocab_size=64,
    )  # fmt: skip
    seq_length = 16
    x = torch.randn(seq_length, 32)
    with FlopCounterMode(display=False) as counter:
        query, key, value = x @ torch.randn(32, 32), x @ torch.randn(32, 16), x @ torch.randn(32, 16)
        query, key, value = (t.view(seq_length, -1, 8).transpose(0, 1) for t in (query, key, value))
        scores = query @ key.repeat_interleave(2, 0).transpose(1, 2)
        x = (scores @ value.repeat_interleave(2, 0)).transpose(0, 1).reshape(seq_length, 32) @ torch.randn(32, 32)
        square = 2 * scores.numel() * 8 * 2
        (x @ torch.randn(32, 48)) @ torch.randn(48, 32) @ torch.randn(32, 64)
    forward = count_model(model, parse_pattern("*-"), seq_length).flops_per_token // 3
    assert forward * seq_length == counter.get_total_flops() - square // 2
