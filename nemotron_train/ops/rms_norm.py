"""How does the RMSNorm before every projection run fast in plain torch, keeping only its input and one number a token?

Shapes: T tokens (all leading axes together), C channels.
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Return weight * x / rms(x) over the last axis, in x's dtype; computed in float32 (float64 for float64 inputs)."""
    return _RmsNorm.apply(x, weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square_sum = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square_sum.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dtype, channels = scale.dtype, x.shape[-1]
        dout_TC, x_TC, scale_T1 = (t.flatten(0, -2).to(dtype) for t in (dout, x, scale))
        # Both sums, over tokens for the weight and over channels for the mean square, are matrix-vector products of one
        # tensor.
        product_TC = dout_TC * x_TC
        dweight_C = product_TC.mT @ scale_T1.squeeze(-1)
        along_T1 = (product_TC @ weight.to(dtype)).unsqueeze(-1)
        dx_TC = torch.mul(dout_TC, weight, out=product_TC).mul_(scale_T1)
        dx_TC.addcmul_(x_TC, along_T1 * scale_T1.pow(3), value=-1.0 / channels)
        return dx_TC.to(x.dtype).view(x.shape), dweight_C.to(weight.dtype), None
