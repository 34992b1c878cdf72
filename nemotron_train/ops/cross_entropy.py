"""How is the loss per token computed in plain torch in two passes over the logits, where one rank holds the vocabulary?

Forward and backward take a block of tokens at a time, so that the passes work in a core's cache. The one large tensor
kept is exp(logits - max), and the backward turns it into the gradient in place.

Shapes: T tokens (all leading axes together), V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

_BLOCK_NUMBERS = 1 << 17  # numbers of a block: small enough for a core's cache, large enough to hide the loop


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] of each token, in nats, in labels' shape.

    Args:
        logits: vocabulary last, the axes before it those of labels.
    Returns:
        float32 whatever the logits are (float64 for float64 logits). Its gradient can be taken once.
    """
    return _CrossEntropy.apply(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits_TV, labels_T1 = logits.flatten(0, -2), labels.reshape(-1, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        exp_TV = torch.empty(logits_TV.shape, dtype=wide, device=logits.device)
        sum_T1 = torch.empty(len(exp_TV), 1, dtype=wide, device=logits.device)
        loss_T1 = logits_TV.gather(1, labels_T1).to(wide).neg_()
        for block in _blocks(logits_TV):
            largest = logits_TV[block].amax(1, keepdim=True).to(wide)
            torch.sub(logits_TV[block], largest, out=exp_TV[block]).exp_()
            torch.sum(exp_TV[block], 1, keepdim=True, out=sum_T1[block])
            loss_T1[block] += largest
        loss_T1 += sum_T1.log()
        ctx.save_for_backward(labels_T1, sum_T1)
        ctx.exp_TV, ctx.logits = exp_TV, (logits.shape, logits.dtype)
        return loss_T1.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        labels_T1, sum_T1 = ctx.saved_tensors
        shape, dtype = ctx.logits
        assert ctx.exp_TV is not None, "the gradient of a cross-entropy can be taken once"
        d_TV, ctx.exp_TV = ctx.exp_TV, None
        dloss_T1 = dloss.reshape(-1, 1)
        scale_T1 = dloss_T1 / sum_T1
        d_TV.mul_(scale_T1).scatter_add_(1, labels_T1, -dloss_T1)
        return d_TV.to(dtype).view(shape), None


def _blocks(t_TV: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_NUMBERS // t_TV.shape[1])
    return [slice(start, start + rows) for start in range(0, len(t_TV), rows)]
