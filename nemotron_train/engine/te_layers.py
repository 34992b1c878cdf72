"""The parts of a layer from Transformer Engine, for CUDA: fused norm and quantisation, FP8 products, cuDNN attention.

They are Megatron-Core's wrappers, for their constructors and checkpoint layout. Imported only where Transformer Engine
is there.
"""

from contextlib import AbstractContextManager
from typing import Any

import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
    te_checkpoint,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.precision.recipe import Fp8Recipe
from nemotron_train.precision.te_recipe import te_recipe


def rms_norm(config: TransformerConfig, hidden_size: int) -> nn.Module:
    """Build the norm after the last layer."""
    return TENorm(config, hidden_size, eps=config.layernorm_epsilon)


def enter_fp8(recipe: Fp8Recipe, group: Any) -> AbstractContextManager:
    """Let the linear layers inside run in FP8; `group` is that over which maxima are reduced."""
    return te.autocast(enabled=True, recipe=te_recipe(recipe), amax_reduction_group=group)


def checkpoint(run: Any, x: Tensor, group: Any) -> Tensor:
    """Run without keeping activations; they are computed again in the backward pass, with the same FP8 state."""
    return te_checkpoint(run, False, get_cuda_rng_tracker, group, x)


def output_linear(config: TransformerConfig, vocab_size: int, group: Any) -> nn.Module:
    """Build the output layer. It adds its weight gradient to the main gradient inside the product (no apex needed)."""
    return TEColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=group,
    )


__all__ = [
    "TEDotProductAttention",
    "TELayerNormColumnParallelLinear",
    "TERowParallelLinear",
    "checkpoint",
    "enter_fp8",
    "output_linear",
    "rms_norm",
]
