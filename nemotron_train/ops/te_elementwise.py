"""Squared ReLU and cross-entropy with Transformer Engine's kernels; imported only where it is there.

Shapes: S sequence, B micro-batch, v this rank's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import transformer_engine_torch as te_kernels
from torch import Tensor
from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0) squared, in x's dtype, in one pass."""
    return _SquaredRelu.apply(x)


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return te_kernels.srelu(x, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return te_kernels.dsrelu(dy.contiguous(), x, None)


def cross_entropy(logits_SBv: Tensor, labels_SB: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """As `ops/cross_entropy.py` has it; the logits become their gradient in place, in their own dtype."""
    # Flat, because the kernel goes by the strides of the last axes, which mean nothing where an axis has size 1.
    logits_1Tv, labels_T = logits_SBv.flatten(0, 1).unsqueeze(0), labels_SB.flatten()
    return parallel_cross_entropy(logits_1Tv, labels_T, dist_process_group=group).view(labels_SB.shape)
