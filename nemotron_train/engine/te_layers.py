"""The parts of a layer from Transformer Engine, for CUDA: fused norm and quantisation, FP8 products, cuDNN attention.

They are Megatron-Core's wrappers, for their constructors and checkpoint layout. Imported only where Transformer Engine
is there.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
    te_checkpoint,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from nemotron_train.engine.in_place_embedding import InPlaceEmbedding
from nemotron_train.ops.documents import Documents
from nemotron_train.precision.recipe import Fp8Recipe
from nemotron_train.precision.te_recipe import te_recipe

# cuDNN's norms take less than half the time of Transformer Engine's own at widths like 5120, for which it has no tuned
# kernel. Transformer Engine asks for this at the first norm, and in no other way.
os.environ.update(NVTE_NORM_FWD_USE_CUDNN="1", NVTE_NORM_BWD_USE_CUDNN="1")


class DotProductAttention(TEDotProductAttention):
    """Attention over each sample, or over each of its documents."""

    def forward(
        self,
        query_SBhP: Tensor,
        key_SBgP: Tensor,
        value_SBgP: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: Documents | None = None,
    ) -> Tensor:
        """Returns the heads side by side, [S, B, h * P]."""
        if packed_seq_params is None:
            return super().forward(query_SBhP, key_SBgP, value_SBgP, attention_mask, attn_mask_type, attention_bias)
        seq, batch = query_SBhP.shape[:2]
        starts = packed_seq_params.cu_seqlens
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=seq, max_seqlen_kv=seq
        )
        # Samples one after the other, as their documents are counted.
        q, k, v = (t.transpose(0, 1).flatten(0, 1).contiguous() for t in (query_SBhP, key_SBgP, value_SBgP))
        out = super().forward(q, k, v, attention_mask, attn_mask_type, attention_bias, packed)
        return out.view(batch, seq, -1).transpose(0, 1).contiguous()


@contextmanager
def enter_fp8(recipe: Fp8Recipe, group: Any) -> Iterator[None]:
    """Let the linear layers inside run in FP8; `group` is that over which maxima are reduced."""
    with te.autocast(enabled=True, recipe=te_recipe(recipe), amax_reduction_group=group):
        yield
    if not torch.is_grad_enabled():
        # Delayed scaling would add the maxima of an evaluation to those of the next training step, and a run that was
        # stopped before it evaluated would go on with other scales.
        for maxima in FP8GlobalStateManager.global_amax_buffer.values():
            torch._foreach_zero_(maxima)


def fp8_weights(recipe: Fp8Recipe) -> AbstractContextManager:
    """Let the linear layers that are built inside hold their weights in FP8 and in nothing else.

    Each keeps its first values, in bfloat16 and on the host, until the optimizer has made its master weights of them.
    """
    return te.quantized_model_init(enabled=True, recipe=te_recipe(recipe), preserve_high_precision_init_val=True)


def recompute(run: Any, x: Tensor, group: Any) -> Tensor:
    """Run without keeping activations; they are computed again in the backward pass, with the same FP8 state."""
    return te_checkpoint(run, False, get_cuda_rng_tracker, group, x)


def output_linear(config: TransformerConfig, vocab_size: int, group: Any) -> nn.Module:
    """Build the output layer. It adds its weight gradient to the main gradient inside the product (no apex needed)."""
    config = copy(config)
    config.tp_comm_overlap = False  # Transformer Engine has user buffers for the layers' products alone
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
    "DotProductAttention",
    "InPlaceEmbedding",
    "TEColumnParallelLinear",
    "TELayerNormColumnParallelLinear",
    "TENorm",
    "TERowParallelLinear",
    "enter_fp8",
    "fp8_weights",
    "output_linear",
    "recompute",
]
