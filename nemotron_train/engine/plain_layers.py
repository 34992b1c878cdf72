"""The parts of a layer in plain torch: linears, norms and attention that run on any device.

They take the constructor arguments of Megatron-Core's Transformer Engine layers and hold parameters of the same names
and shapes (`layer_norm_weight` inside the projection that follows the norm), so a checkpoint does not know which of
them wrote it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.ops.rms_norm import rms_norm

# Shapes: S sequence, B micro-batch, D hidden, H heads, G query groups, P head dim; lower case: this rank's share.


def make_norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    """A norm's scale.

    Under sequence parallelism each rank sees part of the sequence, so its gradient is summed over tensor-parallel
    ranks.
    """
    weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device()))
    weight.sequence_parallel = config.sequence_parallel
    return weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, on this rank's part of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int) -> None:
        super().__init__()
        self.epsilon = config.layernorm_epsilon
        self.weight = make_norm_weight(config, hidden_size)

    def forward(self, x_sBD: Tensor) -> Tensor:
        return rms_norm(x_sBD, self.weight, epsilon=self.epsilon)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm followed by a column-parallel linear: the counterpart of Transformer Engine's fused LayerNormLinear."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, init_method=init_method, **kwargs)
        self.epsilon = config.layernorm_epsilon
        self.layer_norm_weight = make_norm_weight(config, input_size)

    def forward(self, x_sBD: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(rms_norm(x_sBD, self.layer_norm_weight, epsilon=self.epsilon), *args, **kwargs)


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(P)) V over earlier tokens, grouped queries, no positions; torch's fused implementation."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query_SBhP: Tensor, key_SBgP: Tensor, value_SBgP: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the heads side by side, [S, B, h * P]."""
        seq, batch, heads, head_dim = query_SBhP.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query_SBhP, key_SBgP, value_SBgP))
        out_BhSP = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out_BhSP.permute(2, 0, 1, 3).reshape(seq, batch, heads * head_dim)


__all__ = ["CausalAttention", "NormColumnParallelLinear", "RMSNorm", "RowParallelLinear"]
