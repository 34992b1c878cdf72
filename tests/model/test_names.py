"""Does the table of parameter names cover a model of all layer kinds, each name once?"""

from pathlib import Path

import pytest

from nemotron_train.config.schema import Norm, PositionEmbedding, QkvNorm
from nemotron_train.model.names import _RULES, rule_for
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.optim.parameter_groups import VECTOR_GROUPS
from tests.engine.live import reference_sizes
from tests.small_runs import small_config

DECAYS = {
    "embedding.word_embeddings.weight",
    "decoder.layers.0.mixer.in_proj.weight",
    "decoder.layers.0.mixer.conv1d.weight",
    "decoder.layers.0.mixer.out_proj.weight",
    "decoder.layers.1.self_attention.linear_qkv.weight",
    "decoder.layers.1.self_attention.linear_proj.weight",
    "decoder.layers.2.mlp.linear_fc1.weight",
    "decoder.layers.2.mlp.linear_fc2.weight",
    "output_layer.weight",
}
DOES_NOT_DECAY = {
    "decoder.layers.0.mixer.in_proj.layer_norm_weight",
    "decoder.layers.0.mixer.conv1d.bias",
    "decoder.layers.0.mixer.norm.weight",
    "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
    "decoder.final_norm.weight",
}
DOES_NOT_DECAY_AND_STAYS_FLOAT32 = {
    "decoder.layers.0.mixer.dt_bias",
    "decoder.layers.0.mixer.A_log",
    "decoder.layers.0.mixer.D",
}
# What a model with all other parts has besides.
DECAYS_IN_A_GPT = {"embedding.position_embeddings.weight"}
DOES_NOT_DECAY_IN_A_GPT = {
    "decoder.layers.0.self_attention.linear_qkv.layer_norm_bias",
    "decoder.layers.0.self_attention.linear_qkv.bias",
    "decoder.layers.0.self_attention.q_layernorm.weight",
    "decoder.layers.0.self_attention.q_layernorm.bias",
    "decoder.layers.0.self_attention.k_layernorm.weight",
    "decoder.layers.0.self_attention.k_layernorm.bias",
    "decoder.layers.0.self_attention.linear_proj.bias",
    "decoder.layers.0.output_norm.weight",
    "decoder.layers.0.output_norm.bias",
    "decoder.layers.0.layer_scale",
    "decoder.layers.1.mlp.linear_fc1.layer_norm_bias",
    "decoder.layers.1.mlp.linear_fc1.bias",
    "decoder.layers.1.mlp.linear_fc2.bias",
    "decoder.layers.1.output_norm.weight",
    "decoder.layers.1.output_norm.bias",
    "decoder.layers.1.layer_scale",
    "decoder.final_norm.bias",
}
OF_VALUES = {f"decoder.layers.0.self_attention.v_layernorm.{kind}" for kind in ("weight", "bias")}
GPT = dict(
    layer_pattern="*-", norm=Norm.layer, linear_bias=True, position_embedding=PositionEmbedding.learned,
    max_position_embeddings=32, qkv_norm=QkvNorm.qk, output_norm=True, layer_scale=0.1,
)  # fmt: skip
ALL = DECAYS | DOES_NOT_DECAY | DOES_NOT_DECAY_AND_STAYS_FLOAT32


def test_the_lists_here_are_the_parameters_of_a_model() -> None:
    """Fails if a layer kind gets a parameter that is listed nowhere."""
    config = small_config(Path("unused"), Path("unused"), model={"layer_pattern": "M*-"})
    assert {name for name, _ in HybridModel(reference_sizes(config.model)).named_parameters()} == ALL


def names_in(**model: object) -> set[str]:
    config = small_config(Path("unused"), Path("unused"), model=model)
    return {name for name, _ in HybridModel(reference_sizes(config.model)).named_parameters()}


def test_the_lists_here_are_the_parameters_of_a_gpt() -> None:
    """Fails if a part gets a parameter that is listed nowhere."""
    added = names_in(**GPT) - names_in(layer_pattern="*-")
    assert added == DECAYS_IN_A_GPT | DOES_NOT_DECAY_IN_A_GPT
    assert names_in(**{**GPT, "qkv_norm": QkvNorm.qkv}) - names_in(**GPT) == OF_VALUES


@pytest.mark.parametrize("name", sorted(ALL | DECAYS_IN_A_GPT | DOES_NOT_DECAY_IN_A_GPT | OF_VALUES))
def test_a_parameter_has_one_rule_whatever_wraps_the_model(name: str) -> None:
    """Fails if two rows of the table fit a name, or a wrapper's prefix changes which one does."""
    assert len([ending for ending in _RULES if name.endswith(ending)]) == 1
    assert rule_for(f"module.module.{name}") is rule_for(name)


def test_matrices_decay_and_nothing_else_does() -> None:
    """Fails if a norm, bias, A_log, D or dt_bias decays, a matrix does not, or a parameter is in two optimizer
    groups."""
    assert {name for name in ALL if rule_for(name).decays} == DECAYS
    assert {name for name in ALL if rule_for(name).float32} == DOES_NOT_DECAY_AND_STAYS_FLOAT32
    held = {group.name: {name for name in ALL if group.holds(name)} for group in VECTOR_GROUPS}
    assert held == {"vectors": DOES_NOT_DECAY, "float32_vectors": DOES_NOT_DECAY_AND_STAYS_FLOAT32}
    in_a_gpt = DECAYS_IN_A_GPT | DOES_NOT_DECAY_IN_A_GPT | OF_VALUES
    assert {name for name in in_a_gpt if rule_for(name).decays} == DECAYS_IN_A_GPT
    assert not any(rule_for(name).float32 for name in in_a_gpt)
    assert all(group.decay_factor == 0.0 for group in VECTOR_GROUPS)


def test_an_unknown_name_is_an_error() -> None:
    """Fails if a new parameter gets another one's rule without a word."""
    with pytest.raises(KeyError, match=r"router\.weight"):
        rule_for("decoder.layers.0.router.weight")
