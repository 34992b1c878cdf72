"""How many bytes does a layer keep for its backward pass, and how many more while that runs?

Read off the code that runs on CUDA, tensor by tensor: Transformer Engine's linears (`engine/te_layers.py`), the Mamba
core (`ops/triton_core.py`), squared ReLU (`ops/te_squared_relu.py`) and cross-entropy (`ops/triton_cross_entropy.py`).
Sizes are of one micro-batch on one rank.
"""

from dataclasses import dataclass

from nemotron_train.config.schema import (
    ModelSection,
    Norm,
    PositionEmbedding,
    PrecisionFormat,
    QkvNorm,
    Recompute,
    RunConfig,
    StateFormat,
)
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.precision_map import FP8_BLOCK
from nemotron_train.plan.rank_share import RankTokens, share_of_rank, tokens_on_rank
from nemotron_train.plan.sizes import convolution_channels

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer."""

    kept: int  # from the forward to the backward pass
    recomputed: int  # kept only while its backward pass runs, having been computed again
    working: int  # gradients and scratch of its backward pass


@dataclass(frozen=True)
class _Sizes:
    """What the formulas of all kinds need."""

    tokens: RankTokens
    share: ModelSection  # this rank's part of the model
    dense: int  # bytes of a number in the precision of the weights
    into_product: float  # bytes of a number that a linear layer keeps of its input
    fp8: bool
    looked_at: int  # tokens that one token's scores are computed with

    @property
    def statistics(self) -> int:
        """Return the bytes of what a norm keeps of a token, or of a token's head, beside its input."""
        return FLOAT32_BYTES * (2 if self.share.norm is Norm.layer else 1)  # 1 / rms; mean and 1 / deviation

    @property
    def residual(self) -> int:
        """Return the bytes of what runs between layers."""
        return self.tokens.residual * self.share.hidden_size * self.dense

    @property
    def normed(self) -> float:
        """Return the bytes of a normed input, as the first linear layer keeps it, with what the norm keeps."""
        return self.tokens.residual * (self.share.hidden_size * self.into_product + self.statistics)

    @property
    def before_residual(self) -> float:
        """Return the bytes of the layer's output as its norm and its scale keep it."""
        norm = self.residual + self.tokens.residual * self.statistics if self.share.output_norm else 0
        return norm + (self.residual if self.share.layer_scale is not None else 0)


def weight_bytes(format: PrecisionFormat) -> int:
    """Return the bytes of a weight, or of an activation outside FP8."""
    return 4 if format is PrecisionFormat.fp32 else 2


def state_bytes(format: StateFormat) -> int:
    """Return the bytes of an element of main gradients or moments."""
    return 2 if format is StateFormat.bf16 else 4


def layer_activations(kind: LayerKind, in_fp8: bool, config: RunConfig, seq_length: int) -> LayerActivations:
    """Count one layer; with `train.recompute=full` it keeps its input alone."""
    dense = weight_bytes(config.precision.format)
    scales = FLOAT32_BYTES / FP8_BLOCK if config.precision.format is PrecisionFormat.fp8_block else 0.0
    sizes = _Sizes(
        tokens=tokens_on_rank(config, seq_length),
        share=share_of_rank(config.model, config.parallel.tensor_parallel_size),
        dense=dense,
        into_product=1 + scales if in_fp8 else dense,
        fp8=in_fp8,
        looked_at=seq_length,
    )
    count = {LayerKind.mamba: _mamba, LayerKind.attention: _attention, LayerKind.mlp: _mlp}[kind]
    inner, core, working = count(sizes)
    kept, recompute = sizes.residual + sizes.normed + inner + sizes.before_residual, config.train.recompute
    if recompute is Recompute.full:
        return LayerActivations(sizes.residual, round(kept - sizes.residual + core), round(working))
    if recompute is Recompute.selective:
        return LayerActivations(round(kept), round(core), round(working))
    return LayerActivations(round(kept + core), 0, round(working))


def _mamba(sizes: _Sizes) -> tuple[float, float, float]:
    """Kept: the packed projection and the input of out_proj. Core: the scan's output and states, step sizes, the norm's
    scales."""
    share, tokens, dense = sizes.share, sizes.tokens.layer, sizes.dense
    inner, convolved = share.mamba_num_heads * share.mamba_head_dim, convolution_channels(share)
    packed = inner + convolved + share.mamba_num_heads
    kept = tokens * (packed * dense + inner * sizes.into_product)
    states = tokens / share.mamba_chunk_size * inner * share.mamba_state_dim * dense
    core = tokens * (inner * dense + (2 * share.mamba_num_heads + share.mamba_num_groups) * FLOAT32_BYTES) + states
    # Gradients of the projection, of the scan's output and of what was convolved; that again; states' gradients.
    working = tokens * (packed + inner + 2 * convolved) * dense + states
    return kept, core, working


def _attention(sizes: _Sizes) -> tuple[float, float, float]:
    """Kept: the packed projection (keys and values are views of it), queries, the output, and its FP8 copy."""
    share, tokens, dense = sizes.share, sizes.tokens.layer, sizes.dense
    queries = share.num_attention_heads * share.attention_head_dim
    packed = queries + 2 * share.num_query_groups * share.attention_head_dim
    kept = tokens * ((packed + 2 * queries) * dense + (queries * sizes.into_product if sizes.fp8 else 0))
    core = tokens * share.num_attention_heads * FLOAT32_BYTES  # log-sum-exp of the scores
    working = tokens * (2 * packed + queries) * dense
    if share.attention_logit_cap is not None:
        scores = tokens * share.num_attention_heads * sizes.looked_at
        # Of the tanh and of the softmax, in float32, and the weights as the product with the values takes them.
        core = scores * (2 * FLOAT32_BYTES + (dense if dense < FLOAT32_BYTES else 0))
        working += 2 * scores * FLOAT32_BYTES
    return kept + _around_attention(sizes, queries), core, working


def _around_attention(sizes: _Sizes, queries: int) -> float:
    """Count what norms and rotation of queries, keys and values keep besides, and not the norm that `qkv` replaces."""
    share, tokens = sizes.share, sizes.tokens.layer
    keys, heads = share.num_query_groups * share.attention_head_dim, share.num_attention_heads + share.num_query_groups
    if share.qkv_norm is QkvNorm.none:
        # Rotated keys are no views any more; rotated queries take the place of those that were not.
        return tokens * keys * sizes.dense if share.position_embedding is PositionEmbedding.rope else 0.0
    kept = tokens * ((queries + keys) * sizes.dense + heads * sizes.statistics)  # and rotated ones take their place
    if share.qkv_norm is QkvNorm.qk:
        return kept
    kept += tokens * (keys * sizes.dense + share.num_query_groups * sizes.statistics)
    return kept - (sizes.normed if not sizes.fp8 else sizes.tokens.residual * sizes.statistics)


def _mlp(sizes: _Sizes) -> tuple[float, float, float]:
    """Kept: what goes into squared ReLU, and what comes out as FC2 reads it."""
    tokens, ffn = sizes.tokens.layer, sizes.share.ffn_hidden_size
    return tokens * ffn * (sizes.dense + sizes.into_product), 0, 2 * tokens * ffn * sizes.dense


def head_activations(config: RunConfig, seq_length: int) -> LayerActivations:
    """Count final norm, output layer and loss: the logits become their gradient in place and go at once."""
    tokens, dense = tokens_on_rank(config, seq_length), weight_bytes(config.precision.format)
    around = 2 * tokens.residual * config.model.hidden_size * dense  # input of the norm and of the output layer
    logits = tokens.layer * config.model.vocab_size // config.parallel.tensor_parallel_size * dense
    return LayerActivations(around, 0, logits)
