"""How is the loss per token computed in plain torch, with the vocabulary split over tensor-parallel ranks?

Forward and backward take a block of tokens at a time, so that their passes over the logits work in a core's cache. The
logits, the largest tensor of a small model's step, become exp(logits - max) and then their own gradient in place.

Shapes: S sequence, B micro-batch, T = S B tokens, v this rank's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK_NUMBERS = 1 << 17  # numbers of a block: small enough for a core's cache, large enough to hide the loop


def cross_entropy(logits_SBv: Tensor, labels_SB: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return -log softmax(logits)[label] of each token in nats (S B).

    Args:
        logits_SBv: overwritten, unless they are in less than float32.
        labels_SB: token ids of the whole vocabulary.
        group: the ranks that hold the parts of the vocabulary, in order and of one size; None where this one holds all.

    Returns:
        float32 whatever the logits are (float64 for float64 logits). Its gradient can be taken once.
    """
    return _CrossEntropy.apply(logits_SBv, labels_SB, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.logits = logits.shape, logits.dtype
        index_T1, is_here_T1 = _own_labels(labels.reshape(-1, 1), logits.shape[-1], group)
        wide = torch.promote_types(logits.dtype, torch.float32)
        exp_Tv = logits.detach().flatten(0, -2).to(wide)
        largest_T1, sum_T1, own_T1 = (exp_Tv.new_empty(len(exp_Tv), 1) for _ in range(3))
        blocks = _blocks(exp_Tv)
        for block in blocks:
            torch.amax(exp_Tv[block], 1, keepdim=True, out=largest_T1[block])
        _reduce(largest_T1, dist.ReduceOp.MAX, group)
        for block in blocks:
            logits = exp_Tv[block].sub_(largest_T1[block])
            torch.gather(logits, 1, index_T1[block], out=own_T1[block])
            torch.sum(logits.exp_(), 1, keepdim=True, out=sum_T1[block])
        own_T1 *= is_here_T1
        _reduce(sum_T1, dist.ReduceOp.SUM, group)
        _reduce(own_T1, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(index_T1, is_here_T1, sum_T1)
        ctx.exp_Tv = exp_Tv
        return (sum_T1.log() - own_T1).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        index_T1, is_here_T1, sum_T1 = ctx.saved_tensors
        shape, dtype = ctx.logits
        assert ctx.exp_Tv is not None, "the gradient of a cross-entropy can be taken once"
        d_Tv, ctx.exp_Tv = ctx.exp_Tv, None
        dloss_T1 = dloss.reshape(-1, 1)
        d_Tv.mul_(dloss_T1 / sum_T1).scatter_add_(1, index_T1, -dloss_T1 * is_here_T1)
        return d_Tv.to(dtype).view(shape), None, None


def _own_labels(labels_T1: Tensor, size: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return each label's index in this rank's part of the vocabulary, 0 where it is not there, and whether it is."""
    index_T1 = labels_T1 - size * (0 if group is None else group.rank())
    is_here_T1 = (index_T1 >= 0) & (index_T1 < size)
    return index_T1.where(is_here_T1, 0), is_here_T1


def _reduce(t: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(t, operation, group)


def _blocks(t_Tv: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_NUMBERS // t_Tv.shape[1])
    return [slice(start, start + rows) for start in range(0, len(t_Tv), rows)]
