"""The parts of a layer in plain torch: linears, norms and attention that run on any device.

They take the constructor arguments of Megatron-Core's Transformer Engine layers and hold parameters of the same names
and shapes (`layer_norm_weight` inside the projection that follows the norm), so a checkpoint does not know which of
them wrote it.
"""

import importlib.util
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.ops.capped_attention import capped_attention
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.layer_norm import layer_norm
from nemotron_train.ops.rms_norm import rms_norm

# Shapes: S sequence, B micro-batch, D hidden, H heads, G query groups, P head dim; lower case: this rank's share.


def make_norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    """A norm's scale, or bias, or another parameter of every channel.

    Under sequence parallelism each rank sees part of the sequence, so its gradient is summed over tensor-parallel
    ranks.
    """
    weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device()))
    weight.sequence_parallel = config.sequence_parallel
    return weight


def _make_norm_bias(config: TransformerConfig, size: int) -> nn.Parameter | None:
    return make_norm_weight(config, size) if config.normalization == "LayerNorm" else None


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    if bias is None:
        return rms_norm(x, weight, epsilon=epsilon)
    return layer_norm(x, weight, bias, epsilon=epsilon)


class Norm(nn.Module):
    """The model's norm, RMSNorm or LayerNorm, over the last dimension, on this rank's part of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = make_norm_weight(config, hidden_size)
        self.bias = _make_norm_bias(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return _norm(x, self.weight, self.bias, self.epsilon)


class NormColumnParallelLinear(ColumnParallelLinear):
    """A norm followed by a column-parallel linear: the counterpart of Transformer Engine's fused LayerNormLinear."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, init_method=init_method, **kwargs)
        self.epsilon = config.layernorm_epsilon
        self.layer_norm_weight = make_norm_weight(config, input_size)
        self.layer_norm_bias = _make_norm_bias(config, input_size)

    def normalize(self, x_sBD: Tensor) -> Tensor:
        return _norm(x_sBD, self.layer_norm_weight, self.layer_norm_bias, self.epsilon)

    def forward(self, x_sBD: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(self.normalize(x_sBD), *args, **kwargs)


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(P)) V over earlier tokens, grouped queries; torch's fused implementation."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query_SBhP: Tensor,
        key_SBgP: Tensor,
        value_SBgP: Tensor,
        *args: Any,
        packed_seq_params: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the heads side by side, [S, B, h * P]; with documents, of each by itself."""
        if packed_seq_params is None:
            return self._attend(query_SBhP, key_SBgP, value_SBgP)
        return packed_seq_params.run_each(self._attend, query_SBhP, key_SBgP, value_SBgP)

    def _attend(self, query_SBhP: Tensor, key_SBgP: Tensor, value_SBgP: Tensor) -> Tensor:
        out_BhSP = self._attend_heads(*(t.permute(1, 2, 0, 3) for t in (query_SBhP, key_SBgP, value_SBgP)))
        return out_BhSP.permute(2, 0, 1, 3).flatten(2)

    def _attend_heads(self, q_BhSP: Tensor, k_BgSP: Tensor, v_BgSP: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_BhSP, k_BgSP, v_BgSP, is_causal=True, scale=self.scale, enable_gqa=True)


class CappedAttention(CausalAttention):
    """The same with capped scores; it is not fused, on any device."""

    def __init__(self, cap: float, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.cap = cap

    def _attend_heads(self, q_BhSP: Tensor, k_BgSP: Tensor, v_BgSP: Tensor) -> Tensor:
        scale = self.scale or q_BhSP.shape[-1] ** -0.5
        return capped_attention(q_BhSP, k_BgSP, v_BgSP, scale=scale, cap=self.cap)


def output_linear(config: TransformerConfig, vocab_size: int, group: Any) -> ColumnParallelLinear:
    """Build the output layer with a weight of its own."""
    return tied_output_linear(config, vocab_size, group, holds_weight=True)


def tied_output_linear(
    config: TransformerConfig, vocab_size: int, group: Any, *, holds_weight: bool
) -> ColumnParallelLinear:
    """Build an output layer that takes its weight, the embedding's, in every call; on any platform.

    Args:
        holds_weight: a copy of the embedding's weight lives here, because the embedding is on another pipeline stage.
    """
    fused = config.gradient_accumulation_fusion and importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
    # Megatron-Core's layer can add its weight gradient to the main gradient only with apex's kernel. A copy, because
    # `dataclasses.replace` would derive everything anew.
    config = copy(config)
    config.gradient_accumulation_fusion = bool(fused)
    return ColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=not holds_weight,
        tp_group=group,
    )


__all__ = [
    "CappedAttention",
    "CausalAttention",
    "ColumnParallelLinear",
    "Norm",
    "NormColumnParallelLinear",
    "RowParallelLinear",
    "output_linear",
    "tied_output_linear",
]
