"""How large is the model: parameters and FLOPs by layer kind, in closed form.

Nothing is approximated: norms, biases and the small vectors of a Mamba mixer are counted. FLOPs are model FLOPs: the
matrix products, causal attention at half of its square, and the chunked SSD scan; what recomputation repeats is not
counted.
"""

from dataclasses import dataclass

from nemotron_train.config.schema import ModelSection, Norm, PositionEmbedding, QkvNorm
from nemotron_train.plan.pattern import LayerKind, ParsedPattern

FORWARD_AND_BACKWARD = 3  # the backward pass makes two products (input and weight gradient) for each forward one


@dataclass(frozen=True)
class ModelSizes:
    """Parameters, and forward FLOPs per token, of one layer of every kind and of what is around the layers."""

    num_layers: dict[LayerKind, int]
    layer_parameters: dict[LayerKind, int]
    embedding_parameters: int  # of tokens
    position_parameters: int  # 0 where no positions are learned
    head_parameters: int  # 0 where the embedding is tied
    final_norm_parameters: int
    layer_forward_flops: dict[LayerKind, int]  # per token
    head_forward_flops: int  # per token

    @property
    def parameters(self) -> int:
        layers = sum(self.num_layers[kind] * self.layer_parameters[kind] for kind in LayerKind)
        embeddings = self.embedding_parameters + self.position_parameters
        return layers + embeddings + self.head_parameters + self.final_norm_parameters

    @property
    def flops_per_token(self) -> int:
        """Return the model FLOPs of one token, forward and backward."""
        layers = sum(self.num_layers[kind] * self.layer_forward_flops[kind] for kind in LayerKind)
        return FORWARD_AND_BACKWARD * (layers + self.head_forward_flops)


def count_model(model: ModelSection, pattern: ParsedPattern, seq_length: int) -> ModelSizes:
    """Count a model whose samples have `seq_length` tokens (attention's FLOPs depend on it)."""
    vocabulary = model.vocab_size * model.hidden_size
    return ModelSizes(
        num_layers={kind: pattern.count(kind) for kind in LayerKind},
        layer_parameters={
            LayerKind.mamba: mamba_parameters(model),
            LayerKind.attention: attention_parameters(model),
            LayerKind.mlp: mlp_parameters(model),
        },
        embedding_parameters=vocabulary,
        position_parameters=position_parameters(model),
        head_parameters=0 if model.tied_embeddings else vocabulary,
        final_norm_parameters=norm_parameters(model, model.hidden_size),
        layer_forward_flops={
            LayerKind.mamba: mamba_forward_flops(model),
            LayerKind.attention: attention_forward_flops(model, seq_length),
            LayerKind.mlp: 2 * mlp_weights(model),
        },
        head_forward_flops=2 * vocabulary,
    )


def position_parameters(model: ModelSection) -> int:
    if model.position_embedding is not PositionEmbedding.learned:
        return 0
    return (model.max_position_embeddings or 0) * model.hidden_size


def norm_parameters(model: ModelSection, channels: int) -> int:
    return channels * (2 if model.norm is Norm.layer else 1)


def residual_parameters(model: ModelSection) -> int:
    """Count what is between a layer's output and the residual."""
    norm = norm_parameters(model, model.hidden_size) if model.output_norm else 0
    return norm + (model.hidden_size if model.layer_scale is not None else 0)


def mamba_weights(model: ModelSection) -> int:
    """Count the weights of a Mamba layer's two projections: in (z, x, B, C, dt) and out."""
    inner = model.mamba_num_heads * model.mamba_head_dim
    projected = 2 * inner + 2 * model.mamba_num_groups * model.mamba_state_dim + model.mamba_num_heads
    return model.hidden_size * projected + inner * model.hidden_size


def convolution_channels(model: ModelSection) -> int:
    """Count the channels x, B and C of a Mamba layer's convolution."""
    return model.mamba_num_heads * model.mamba_head_dim + 2 * model.mamba_num_groups * model.mamba_state_dim


def mamba_parameters(model: ModelSection) -> int:
    inner, convolved = model.mamba_num_heads * model.mamba_head_dim, convolution_channels(model)
    convolution = convolved * model.mamba_conv_kernel + convolved  # and its bias
    vectors = 3 * model.mamba_num_heads  # dt_bias, A_log, D
    norms = norm_parameters(model, model.hidden_size) + inner  # before the layer; gated, before the out projection
    return mamba_weights(model) + convolution + vectors + norms + residual_parameters(model)


def attention_weights(model: ModelSection) -> int:
    """Count the weights of query, key, value and output projections."""
    queries = model.num_attention_heads * model.attention_head_dim
    keys_and_values = 2 * model.num_query_groups * model.attention_head_dim
    return model.hidden_size * (queries + keys_and_values) + queries * model.hidden_size


def attention_parameters(model: ModelSection) -> int:
    heads = model.num_attention_heads + 2 * model.num_query_groups
    biases = heads * model.attention_head_dim + model.hidden_size if model.linear_bias else 0
    before = 0 if model.qkv_norm is QkvNorm.qkv else norm_parameters(model, model.hidden_size)
    inside = {QkvNorm.none: 0, QkvNorm.qk: 2, QkvNorm.qkv: 3}[model.qkv_norm]  # each has one weight for all heads
    norms = before + inside * norm_parameters(model, model.attention_head_dim)
    return attention_weights(model) + biases + norms + residual_parameters(model)


def mlp_weights(model: ModelSection) -> int:
    return 2 * model.hidden_size * model.ffn_hidden_size


def mlp_parameters(model: ModelSection) -> int:
    biases = model.ffn_hidden_size + model.hidden_size if model.linear_bias else 0
    return mlp_weights(model) + biases + norm_parameters(model, model.hidden_size) + residual_parameters(model)


def mamba_forward_flops(model: ModelSection) -> int:
    """Count projections and scan.

    Per token the scan attends within its SSD chunk (C times B, causal, then times x), and writes to and reads from a
    state of `mamba_state_dim x mamba_head_dim` in every head.

    Source: Mamba-2, arXiv 2405.21060, section 6.
    """
    chunk, state = model.mamba_chunk_size, model.mamba_state_dim
    inner = model.mamba_num_heads * model.mamba_head_dim
    within_chunk = chunk * state * model.mamba_num_groups + chunk * inner
    return 2 * mamba_weights(model) + within_chunk + 4 * state * inner


def attention_forward_flops(model: ModelSection, seq_length: int) -> int:
    queries = model.num_attention_heads * model.attention_head_dim
    square = 2 * 2 * seq_length * queries  # scores, and scores times values
    return 2 * attention_weights(model) + square // 2  # causal: half of the square
