"""How does the short causal convolution of the Mamba-2 mixer, with its SiLU, run fast in plain torch?

Each channel has its own K weights (K is 4), so the convolution is K multiply-adds of shifted rows: with channels
innermost, as the projection before leaves them, that beats the general convolution with its copies into another
order.

Shapes: B micro-batch, S sequence, C channels, K weights of a channel (the last one is the token's own).
"""

from typing import Any

import torch
from torch import Tensor

_BLOCK_NUMBERS = 1 << 17  # numbers of a block of the backward pass: small enough for a core's cache


def causal_conv_silu(x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    """Return silu(bias + sum over k of weight[:, k] * x of the token K-1-k earlier), in x's dtype.

    Before the start x is 0. Sums are float32 whatever the inputs are (float64 for float64 inputs).
    """
    return _CausalConvSilu.apply(x_BSC, weight_CK, bias_C)


class _CausalConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight_KC = weight.to(wide).t().contiguous()  # rows, so that a row of channels meets a row of weights
        x_wide = x.to(wide)
        before_silu = torch.addcmul(bias.to(wide), x_wide, weight_KC[-1])
        for delay in range(1, min(len(weight_KC), x.shape[1])):
            before_silu[:, delay:].addcmul_(x_wide[:, :-delay], weight_KC[-1 - delay])
        ctx.save_for_backward(x, weight, bias, before_silu)
        return torch.nn.functional.silu(before_silu).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, before_silu = ctx.saved_tensors
        dx, dweight_KC, dbias = _gradients(dy, x, weight.to(before_silu.dtype).t().contiguous(), before_silu)
        return dx.to(x.dtype), dweight_KC.t().to(weight.dtype), dbias.to(bias.dtype)


def _gradients(dy: Tensor, x: Tensor, weight_KC: Tensor, before_silu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight (K C) and dbias, a block of tokens at a time.

    A token's dx takes the gradients of itself and of the K-1 tokens after it.
    """
    wide = before_silu.dtype
    dx = torch.empty_like(before_silu)
    dweight_KC, dbias = torch.zeros_like(weight_KC), torch.zeros_like(weight_KC[0])
    d = torch.ops.aten.silu_backward(dy.to(wide), before_silu)
    seq_length = x.shape[1]
    block = max(1, _BLOCK_NUMBERS // weight_KC.shape[1])
    for d_SC, x_SC, dx_SC in zip(d.unbind(), x.unbind(), dx.unbind(), strict=True):
        for start in range(0, seq_length, block):
            stop = min(start + block, seq_length)
            x_block, dx_block = x_SC[start:stop].to(wide), dx_SC[start:stop]
            dbias += d_SC[start:stop].sum(0)
            torch.mul(d_SC[start:stop], weight_KC[-1], out=dx_block)
            for delay in range(len(weight_KC)):
                d_later = d_SC[start + delay : stop + delay]
                reached = len(d_later)  # less than the block at the end of the sequence
                dweight_KC[-1 - delay] += (d_later * x_block[:reached]).sum(0)
                if delay:
                    dx_block[:reached].addcmul_(d_later, weight_KC[-1 - delay])
    return dx, dweight_KC, dbias
