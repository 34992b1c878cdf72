"""How does the short causal convolution of the Mamba-2 mixer, with its SiLU, run fast in plain torch?

Each channel has its own K weights (K is 4), so the convolution is K multiply-adds of shifted rows: with channels
innermost, as the projection before leaves them, that beats the general convolution with its copies into another
order. Forward and backward take a block of tokens at a time, so that the passes work in a core's cache.

Shapes: B micro-batch, S sequence, C channels, K weights of a channel (the last one is the token's own), L tokens of a
block. Inside, tokens come first: a block of them is one piece of memory.
"""

from typing import Any

import torch
from torch import Tensor

_BLOCK_NUMBERS = 1 << 17  # numbers of a block: small enough for a core's cache, large enough to hide the loop


def causal_conv_silu(x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    """Return silu(bias + sum over k of weight[:, k] * x of the token K-1-k earlier), in x's dtype.

    Before the start x is 0. Sums are float32 whatever the inputs are (float64 for float64 inputs).
    """
    return _CausalConvSilu.apply(x_BSC, weight_CK, bias_C)


class _CausalConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y_SBC, sums_SBC = convolve(x.transpose(0, 1), weight, bias)
        ctx.save_for_backward(x, weight, bias, sums_SBC)
        return y_SBC.to(x.dtype).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, sums_SBC = ctx.saved_tensors
        dx_SBC = torch.empty_like(x.transpose(0, 1))
        dweight, dbias = convolution_gradients(dy.transpose(0, 1), x.transpose(0, 1), weight, sums_SBC, out=dx_SBC)
        return dx_SBC.transpose(0, 1), dweight.to(weight.dtype), dbias.to(bias.dtype)


def convolve(x_SBC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the convolution after and before SiLU, contiguous, in the dtype of the sums."""
    wide = torch.promote_types(x_SBC.dtype, torch.float32)
    weight_KC, bias = weight_CK.to(wide).t().contiguous(), bias_C.to(wide)
    y_SBC, sums_SBC = (torch.empty(x_SBC.shape, dtype=wide, device=x_SBC.device) for _ in range(2))
    for start, stop in _blocks(x_SBC):
        x, before = _with_tokens_before(x_SBC, start, stop, weight_KC)
        sums = torch.addcmul(bias, x[before:], weight_KC[-1], out=sums_SBC[start:stop])
        for delay in range(1, min(len(weight_KC), stop)):
            skipped = max(0, delay - before)  # tokens with none so much earlier
            sums[skipped:].addcmul_(x[before + skipped - delay : len(x) - delay], weight_KC[-1 - delay])
        torch.ops.aten.silu.out(sums, out=y_SBC[start:stop])
    return y_SBC, sums_SBC


def convolution_gradients(
    dy_SBC: Tensor, x_SBC: Tensor, weight_CK: Tensor, sums_SBC: Tensor, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x into `out` (S B C) and return the gradients of weight (C K) and bias, in the sums' dtype.

    From the last block to the first: a token's dx takes the gradients of itself and of the K-1 tokens after it.
    """
    wide = sums_SBC.dtype
    weight_KC = weight_CK.to(wide).t().contiguous()
    dweight_KC, dbias = torch.zeros_like(weight_KC), torch.zeros_like(weight_KC[0])
    blocks = _blocks(x_SBC)
    block, after = blocks[0][1], len(weight_KC) - 1
    # A block's gradient of the sums, and that of the K-1 tokens after it.
    d_LBC = sums_SBC.new_zeros(block + after, *x_SBC.shape[1:])
    product_LBC, dx_LBC = (sums_SBC.new_empty(block, *x_SBC.shape[1:]) for _ in range(2))
    for start, stop in reversed(blocks):
        length = stop - start
        x, before = _with_tokens_before(x_SBC, start, stop, weight_KC)
        d_LBC[length : length + after] = d_LBC[:after].clone()
        d, dx = d_LBC[:length], dx_LBC[:length]
        torch.ops.aten.silu_backward.grad_input(dy_SBC[start:stop].to(wide), sums_SBC[start:stop], grad_input=d)
        dbias += d.flatten(0, 1).sum(0)
        torch.mul(d, weight_KC[-1], out=dx)
        for delay in range(len(weight_KC)):
            if delay:
                dx.addcmul_(d_LBC[delay : delay + length], weight_KC[-1 - delay])
            skipped = max(0, delay - before)  # tokens with none so much earlier
            if skipped < length:
                product = product_LBC[skipped:length]
                torch.mul(d[skipped:], x[before + skipped - delay : len(x) - delay], out=product)
                dweight_KC[-1 - delay] += product.flatten(0, 1).sum(0)
        out[start:stop] = dx
    return dweight_KC.t(), dbias


def _blocks(x_SBC: Tensor) -> list[tuple[int, int]]:
    tokens, row = len(x_SBC), x_SBC.shape[1] * x_SBC.shape[2]
    block = max(1, _BLOCK_NUMBERS // row)
    return [(start, min(start + block, tokens)) for start in range(0, tokens, block)]


def _with_tokens_before(x_SBC: Tensor, start: int, stop: int, weight_KC: Tensor) -> tuple[Tensor, int]:
    """Return a block of x with up to K-1 tokens before it, in the sums' dtype, and how many there are."""
    before = min(start, len(weight_KC) - 1)
    return x_SBC[start - before : stop].to(weight_KC.dtype), before
