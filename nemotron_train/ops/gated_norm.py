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

_BLOCK_NUMBERS = 1 << 17  # numbers of a block: small enough for a core's cache, large enough to hide the loop


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, num_groups: int, epsilon: float) -> Tensor:
    """Return weight * norm(y * silu(z)), each of the `num_groups` groups of the last axis having its own mean square.

    Args:
        y: what is normalised, and z its gate; the same shape, channels last.
        epsilon: added to the mean square.
    Returns:
        In z's dtype; computed in float32 (float64 for float64 inputs).
    """
    return _GatedRmsNorm.apply(y, z, weight, num_groups, epsilon)


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, num_groups: int, epsilon: float) -> Tensor:
        out, scale_TG1 = gate_and_normalise(y, z, weight, num_groups, epsilon)
        ctx.save_for_backward(y, z, weight, scale_TG1)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, scale_TG1 = ctx.saved_tensors
        dy, dz = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
        dweight = gated_norm_gradients(dout, y, z, weight, scale_TG1, out=(dy, dz))
        return dy, dz, dweight.to(weight.dtype), None, None


def gate_and_normalise(y: Tensor, z: Tensor, weight: Tensor, num_groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the output of `gated_rms_norm` and 1 / rms (T G 1), which the backward needs."""
    wide = torch.promote_types(y.dtype, torch.float32)
    y_TC, z_TC = y.flatten(0, -2), z.flatten(0, -2)
    out_TC = torch.empty(y_TC.shape, dtype=z.dtype, device=y.device)
    scale_TG1 = torch.empty(len(y_TC), num_groups, 1, dtype=wide, device=y.device)
    weight_GC = weight.to(wide).view(num_groups, -1)
    for block in _blocks(y_TC):
        gated = functional.silu(z_TC[block].to(wide)).mul_(y_TC[block]).unflatten(-1, weight_GC.shape)
        square_sum = torch.linalg.vector_norm(gated, dim=-1, keepdim=True).square_()
        scale = torch.rsqrt(square_sum.div_(weight_GC.shape[1]).add_(epsilon), out=scale_TG1[block])
        out_TC[block] = gated.mul_(scale).mul_(weight_GC).flatten(-2)
    return out_TC.view(y.shape), scale_TG1


def gated_norm_gradients(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, scale_TG1: Tensor, *, out: tuple[Tensor, Tensor]
) -> Tensor:
    """Write the gradients of y and z into `out` and return that of weight, in the scale's dtype."""
    wide = scale_TG1.dtype
    weight_GC = weight.to(wide).view(scale_TG1.shape[1], -1)
    dweight = torch.zeros_like(weight_GC)
    dout_TC, y_TC, z_TC = (t.flatten(0, -2) for t in (dout, y, z))
    dy_TC, dz_TC = (t.view(len(y_TC), -1) for t in out)  # views: what is written into a copy would be lost

    for block in _blocks(y_TC):
        dout_TGC, y_TGC, z_TGC = (t[block].to(wide).unflatten(-1, weight_GC.shape) for t in (dout_TC, y_TC, z_TC))
        scale = scale_TG1[block]
        gate = functional.silu(z_TGC)
        normed = (gate * y_TGC).mul_(scale)
        product = dout_TGC * normed
        dweight += product.sum(0)
        along_TG1 = product.mul_(weight_GC).sum(-1, keepdim=True).div_(-weight_GC.shape[1])
        dgated = torch.mul(dout_TGC, weight_GC, out=product).addcmul_(normed, along_TG1).mul_(scale)
        torch.mul(gate, dgated, out=normed)
        dy_TC[block] = normed.flatten(-2)
        dz_TC[block] = torch.ops.aten.silu_backward(dgated.mul_(y_TGC), z_TGC).flatten(-2)
    return dweight.view(weight.shape)


def _blocks(t_TC: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_NUMBERS // t_TC.shape[1])
    return [slice(start, start + rows) for start in range(0, len(t_TC), rows)]
