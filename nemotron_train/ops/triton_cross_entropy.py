"""Cross-entropy of vocabulary-parallel logits as Triton kernels: forward reads the logits once, backward turns them
into their gradient in place.

The maximum and the sum of exponentials go along a row together (arXiv 1805.02867, section 3); those of all ranks meet
in one exchange.

Shapes: S sequence, B micro-batch, T = S B tokens, v this rank's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

_FORWARD_BLOCK, _BACKWARD_BLOCK = 2048, 8192  # numbers of a token's row that a program holds at once


def cross_entropy(logits_SBv: Tensor, labels_SB: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """As `ops/cross_entropy.py` has it; the logits become their gradient in place, in their own dtype."""
    return _CrossEntropy.apply(logits_SBv, labels_SB, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.shape = logits.shape
        logits_Tv = logits.detach().flatten(0, -2)
        tokens, size = logits_Tv.shape
        index_T = labels.flatten() - size * (0 if group is None else group.rank())
        sums_3T = torch.empty(3, tokens, dtype=torch.float32, device=logits.device)
        cross_entropy_sums[(tokens,)](
            logits_Tv, index_T, sums_3T, logits_Tv.stride(0), size, BLOCK=_block(_FORWARD_BLOCK, size), num_warps=4
        )
        log_sum_T, own_T = _over_ranks(sums_3T, group)
        ctx.save_for_backward(index_T, log_sum_T)
        ctx.logits_Tv = logits_Tv
        return (log_sum_T - own_T).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        index_T, log_sum_T = ctx.saved_tensors
        assert ctx.logits_Tv is not None, "the gradient of a cross-entropy can be taken once"
        d_Tv, ctx.logits_Tv = ctx.logits_Tv, None
        tokens, size = d_Tv.shape
        block = _block(_BACKWARD_BLOCK, size)
        cross_entropy_gradient[(tokens, triton.cdiv(size, block))](
            d_Tv, index_T, log_sum_T, dloss.flatten(), d_Tv.stride(0), size, BLOCK=block, num_warps=8
        )
        return d_Tv.view(ctx.shape), None, None


def _over_ranks(sums_3T: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return log of the sum of exponentials over the whole vocabulary, and the label's logit, of each token."""
    parts = [sums_3T]
    if group is not None and group.size() > 1:
        parts = [torch.empty_like(sums_3T) for _ in range(group.size())]
        dist.all_gather(parts, sums_3T, group)
    largest_RT, sum_RT, own_RT = torch.stack(parts, dim=1)
    return torch.logsumexp(largest_RT + sum_RT.log(), dim=0), own_RT.sum(0)


def _block(most: int, size: int) -> int:
    return min(most, triton.next_power_of_2(size))


@triton.jit
def cross_entropy_sums(logits, index, sums, row_stride, size, BLOCK: tl.constexpr):
    """Find a token's largest logit, the sum of exp(logit - largest), and its label's logit, 0 if that is elsewhere."""
    row, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    label = tl.load(index + row)
    largest, total, own = float("-inf"), 0.0, 0.0
    for start in range(0, size, BLOCK):
        at = start + columns
        logit = tl.load(logits + row * row_stride + at, mask=at < size, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(logit))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logit - new_largest))
        own += tl.sum(tl.where((at == label) & (at < size), logit, 0.0))  # it may be the next rank's first
        largest = new_largest
    tl.store(sums + row, largest)
    tl.store(sums + tokens + row, total)
    tl.store(sums + 2 * tokens + row, own)


@triton.jit
def cross_entropy_gradient(logits, index, log_sum, dloss, row_stride, size, BLOCK: tl.constexpr):
    """Put (softmax - one at the label) times the loss's gradient in the place of a block of one token's logits."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = logits + row * row_stride + at
    logit = tl.load(there, mask=at < size, other=0.0).to(tl.float32)
    softmax = tl.exp(logit - tl.load(log_sum + row))
    gradient = (softmax - tl.where(at == tl.load(index + row), 1.0, 0.0)) * tl.load(dloss + row)
    tl.store(there, gradient.to(logits.dtype.element_ty), mask=at < size)
