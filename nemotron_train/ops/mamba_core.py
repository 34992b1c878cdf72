"""How does the core of a Mamba-2 mixer, all that lies between its two projections, run fast in plain torch?

Convolution, scan and gated norm are those of the neighbouring files; here they meet as one operation, so that each
reads its part of the projection where it lies, and the gradients of all parts are written into one tensor: neither
the split nor the joining of its gradients copies anything.

Source: Mamba-2, arXiv 2405.21060.

Shapes: S sequence, B micro-batch, f = I + C + H: the packed projection z (I), xBC (C), dt (H); H heads, G groups,
P head dim, N state dim; I = H P, C = I + 2 G N.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.ops.causal_conv import convolution_gradients, convolve
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.gated_norm import gate_and_normalise, gated_norm_gradients
from nemotron_train.ops.ssd import Kept, ScanTensors, scan, scan_gradients


@dataclass(frozen=True)
class MixerSizes:
    """One rank's share of a mixer."""

    heads: int
    head_dim: int
    groups: int
    state: int
    conv_kernel: int
    chunk: int  # tokens per chunk of the scan
    epsilon: float

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def split_projection(self, zxBCdt: Tensor) -> tuple[Tensor, ...]:
        """Cut the last dimension into z, xBC and dt."""
        return zxBCdt.split([self.inner, self.conv_channels, self.heads], dim=-1)

    def split_channels(self, xBC: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
        """Cut the channels of the convolution into x, B and C."""
        of_groups = self.groups * self.state
        return xBC.split([self.inner, of_groups, of_groups], dim)


class CoreWeights(NamedTuple):
    conv_CK: Tensor
    conv_bias_C: Tensor
    dt_bias_H: Tensor
    A_H: Tensor  # decay rate, < 0
    D_H: Tensor
    norm_I: Tensor


def mamba_core(
    zxBCdt_SBf: Tensor, weights: CoreWeights, sizes: MixerSizes, documents: Documents | None = None
) -> Tensor:
    """Return norm(scan(silu(conv(xBC)), softplus(dt + bias)), gated by z) (S B I) in the projection's dtype.

    Between the operations all is float32 (float64 for float64 inputs). With `documents`, convolution and scan begin
    anew with each of them.
    """
    if documents is None:
        return _MambaCore.apply(zxBCdt_SBf, *weights, sizes)
    return documents.run_each(lambda part_SBf: _MambaCore.apply(part_SBf, *weights, sizes), zxBCdt_SBf)


class _MambaCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zxBCdt: Tensor, *arguments: Any) -> Tensor:
        weights, sizes = CoreWeights(*arguments[:-1]), arguments[-1]
        z, xBC, dt = sizes.split_projection(zxBCdt)
        convolved, sums = convolve(xBC, weights.conv_CK, weights.conv_bias_C)
        step = functional.softplus(dt.to(sums.dtype) + weights.dt_bias_H)
        y, kept = scan(_scan_tensors(convolved, step, weights, sizes), sizes.chunk)
        y_SBI = y.flatten(2)
        out, scale = gate_and_normalise(y_SBI, z, weights.norm_I, sizes.groups, sizes.epsilon)
        ctx.save_for_backward(zxBCdt, *weights, sums, convolved, step, *kept, y_SBI, scale)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        zxBCdt, *rest = ctx.saved_tensors
        weights, sizes = CoreWeights(*rest[:6]), ctx.sizes
        sums, convolved, step, states, past, y, scale = rest[6:]
        z, xBC, dt = sizes.split_projection(zxBCdt)
        d_zxBCdt = torch.empty_like(zxBCdt)
        dz, dxBC, ddt = sizes.split_projection(d_zxBCdt)
        dy, d_convolved, d_step = (torch.empty_like(t) for t in (y, convolved, step))
        d_norm = gated_norm_gradients(dout, y, z, weights.norm_I, scale, out=(dy, dz))
        dA, dD = (torch.empty_like(t) for t in (weights.A_H, weights.D_H))
        d_scan = _scan_tensors(d_convolved, d_step, weights._replace(A_H=dA, D_H=dD), sizes)
        scan_inputs = _scan_tensors(convolved, step, weights, sizes)
        scan_gradients(dy.view_as(scan_inputs.x_SBHP), scan_inputs, Kept(states, past), sizes.chunk, out=d_scan)
        d_conv, d_conv_bias = convolution_gradients(d_convolved, xBC, weights.conv_CK, sums, out=dxBC)
        d_dt = d_step.mul_(torch.sigmoid(dt.to(sums.dtype) + weights.dt_bias_H))
        ddt.copy_(d_dt)
        gradients = CoreWeights(d_conv, d_conv_bias, d_dt.sum((0, 1)), dA, dD, d_norm)
        return d_zxBCdt, *(d.to(weight.dtype) for d, weight in zip(gradients, weights, strict=True)), None


def _scan_tensors(xBC_SBC: Tensor, dt_SBH: Tensor, weights: CoreWeights, sizes: MixerSizes) -> ScanTensors:
    x, B, C = sizes.split_channels(xBC_SBC)
    B_SBGN, C_SBGN = (t.unflatten(-1, (sizes.groups, sizes.state)) for t in (B, C))
    return ScanTensors(x.unflatten(-1, (sizes.heads, sizes.head_dim)), dt_SBH, weights.A_H, B_SBGN, C_SBGN, weights.D_H)
