"""What cannot work about the parts of the model (positions, biases, norms, caps); the form of the rules is that of
`rules.py`."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from nemotron_train.config.keys import plain
from nemotron_train.config.schema import ModelSection, PositionEmbedding, QkvNorm, RunConfig
from nemotron_train.plan.batching import sample_lengths
from nemotron_train.plan.pattern import LayerKind, has_layers

# At their defaults a model is one of the family of Nemotron-H and Nano 2, which have none of these parts.
BEYOND_NEMOTRON_H = (
    "norm", "linear_bias", "position_embedding", "max_position_embeddings", "rope_base", "qkv_norm", "output_norm",
    "attention_logit_scale", "attention_logit_cap", "layer_scale",
)  # fmt: skip


def beyond_nemotron_h(model: ModelSection) -> dict[str, Any]:
    """Return the keys, with their plain values, of parts that Nemotron-H and Nano 2 do not have."""
    defaults = {field.name: field.default for field in fields(model)}
    values = {key: plain(getattr(model, key)) for key in BEYOND_NEMOTRON_H}
    return {key: value for key, value in values.items() if value != defaults[key]}


def positions_have_their_keys(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    kind = model.position_embedding
    is_learned = kind is PositionEmbedding.learned
    if is_learned and model.max_position_embeddings is None:
        yield (
            "model.max_position_embeddings is null, but model.position_embedding=learned needs it. Set it to the "
            "tokens of the longest sample."
        )
    for name, reader in (
        ("max_position_embeddings", PositionEmbedding.learned),
        ("rope_base", PositionEmbedding.rope),
    ):
        value = getattr(model, name)
        if value is not None and kind is not reader:
            yield (
                f"model.{name}={value} has no effect with model.position_embedding={kind.value}. Set it to null, or "
                f"model.position_embedding={reader.value}."
            )


def samples_fit_into_the_learned_positions(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    if model.position_embedding is not PositionEmbedding.learned or model.max_position_embeddings is None:
        return
    for key, length in sample_lengths(config):
        if length > model.max_position_embeddings:
            yield (
                f"{key}={length} is more than model.max_position_embeddings={model.max_position_embeddings}. "
                "Shorten the samples, or learn more positions."
            )


def rotated_heads_have_pairs_of_channels(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    if model.position_embedding is PositionEmbedding.rope and model.attention_head_dim % 2:
        yield (
            f"model.attention_head_dim={model.attention_head_dim} is odd, and model.position_embedding=rope rotates "
            f"pairs of channels. Use {model.attention_head_dim + 1}, or another model.position_embedding."
        )


def options_of_attention_need_attention(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    if has_layers(model.layer_pattern, LayerKind.attention):
        return
    for key, value, neutral in (
        ("position_embedding", model.position_embedding, PositionEmbedding.none),
        ("qkv_norm", model.qkv_norm, QkvNorm.none),
        ("attention_logit_scale", model.attention_logit_scale, 1.0),
        ("attention_logit_cap", model.attention_logit_cap, None),
    ):
        if value != neutral and value is not PositionEmbedding.learned:
            neutral_text = "null" if neutral is None else getattr(neutral, "value", neutral)
            yield (
                f"model.{key}={getattr(value, 'value', value)} has no effect: model.layer_pattern="
                f"{model.layer_pattern} has no attention layer (*). Set it to {neutral_text}."
            )


def mamba_layers_have_no_biases(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    if model.linear_bias and has_layers(model.layer_pattern, LayerKind.mamba):
        yield (
            f"model.linear_bias=true is not possible with the Mamba layers (M) of model.layer_pattern="
            f"{model.layer_pattern}: their projections have no biases, here and in the published models. "
            "Set it to false."
        )


def normed_values_are_split_over_the_sequence(config: RunConfig, world_size: int) -> Iterator[str]:
    # The norm of the values is shared by all heads. Megatron-Core sums gradients of such norms over tensor-parallel
    # ranks for queries and keys, by name, and for all where the sequence is split.
    parallel = config.parallel
    if config.model.qkv_norm is not QkvNorm.qkv or parallel.sequence_parallel or parallel.tensor_parallel_size == 1:
        return
    yield (
        f"model.qkv_norm=qkv with parallel.tensor_parallel_size={parallel.tensor_parallel_size} needs "
        "parallel.sequence_parallel=true, it is false."
    )


ARCHITECTURE_RULES = (
    positions_have_their_keys,
    samples_fit_into_the_learned_positions,
    rotated_heads_have_pairs_of_channels,
    options_of_attention_need_attention,
    mamba_layers_have_no_biases,
    normed_values_are_split_over_the_sequence,
)
