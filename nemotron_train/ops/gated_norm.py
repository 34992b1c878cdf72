"""How does the gated RMSNorm at the end of the Mamba-2 mixer run fast in plain torch?

The gate comes first, then the norm over each group of channels: n = y silu(z), out = weight n / rms(n). Forward and
backward take a block of tokens at a time, so that the dozen elementwise passes of the backward work in a core's cache
and nothing but y, z and one number a group is kept.

Shapes: T tokens (all leading axes together), C channels, G groups of channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK_NUMBERS = 1 << 18  # numbers of a block: small enough for a core's cache, large enough to hide the loop


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, num_groups: int, epsilon: float) -> Tensor:
    """Return weight * norm(y * silu(z)), each of the `num_groups` groups of the last axis having its own mean square.

    Args:
        y: what is normalised, and z its gate; the same shape, channels last.
        epsilon: added to the mean square.
    Returns:
        In y's dtype; computed in float32 (float64 for float64 inputs).
    """
    return _GatedRmsNorm.apply(y, z, weight, num_groups, epsilon)


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, num_groups: int, epsilon: float) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        y_TC, z_TC = y.flatten(0, -2), z.flatten(0, -2)
        out_TC = torch.empty(y_TC.shape, dtype=y.dtype, device=y.device)
        scale_TG1 = torch.empty(len(y_TC), num_groups, 1, dtype=wide, device=y.device)
        weight_GC = weight.to(wide).view(num_groups, -1)
        for block in _blocks(y_TC):
            gated = functional.silu(z_TC[block].to(wide)).mul_(y_TC[block]).unflatten(-1, weight_GC.shape)
            square_sum = torch.linalg.vector_norm(gated, dim=-1, keepdim=True).square_()
            scale = torch.rsqrt(square_sum.div_(weight_GC.shape[1]).add_(epsilon), out=scale_TG1[block])
            torch.mul(gated.mul_(scale), weight_GC, out=gated)
            out_TC[block] = gated.flatten(-2)
        ctx.save_for_backward(y, z, weight, scale_TG1)
        return out_TC.view(y.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, scale_TG1 = ctx.saved_tensors
        wide = scale_TG1.dtype
        num_groups = scale_TG1.shape[1]
        flat = [t.flatten(0, -2) for t in (dout, y, z)]
        dy, dz = (torch.empty(flat[0].shape, dtype=t.dtype, device=t.device) for t in (y, z))
        weight_GC = weight.to(wide).view(num_groups, -1)
        dweight = torch.zeros_like(weight_GC)
        for block in _blocks(flat[0]):
            dout_TGC, y_TGC, z_TGC = (t[block].to(wide).unflatten(-1, weight_GC.shape) for t in flat)
            scale = scale_TG1[block]
            gate = functional.silu(z_TGC)
            gated = gate * y_TGC
            # Both sums, over tokens for the weight and over a group's channels for the mean square, are matrix-vector
            # products of one tensor, group by group.
            product_GTC = (dout_TGC * gated).transpose(0, 1)
            dweight += (product_GTC.mT @ scale.transpose(0, 1)).squeeze(-1)
            along_TG1 = (product_GTC @ weight_GC.unsqueeze(-1)).transpose(0, 1)
            dgated = (dout_TGC * weight_GC).mul_(scale)
            dgated.addcmul_(gated, along_TG1 * scale.pow(3), value=-1.0 / weight_GC.shape[1])
            dy[block] = gate.mul_(dgated).flatten(-2)
            dz[block] = torch.ops.aten.silu_backward(dgated.mul_(y_TGC), z_TGC).flatten(-2)
        return dy.view(y.shape), dz.view(z.shape), dweight.view(weight.shape).to(weight.dtype), None, None


def _blocks(t_TC: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_NUMBERS // t_TC.shape[1])
    return [slice(start, start + rows) for start in range(0, len(t_TC), rows)]
