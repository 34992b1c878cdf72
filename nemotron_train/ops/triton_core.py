"""The core of a Mamba-2 mixer on our Triton kernels, with the published kernel for the convolution; imported only where
both are.

The backward pass computes the convolution again instead of keeping it: what is kept is the projection itself, the
scan's output, the states between chunks and some numbers a head or group of each token.

Source: Mamba-2, arXiv 2405.21060. Shapes: as in `mamba_core.py`.
"""

from typing import Any

import torch
from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function
from torch import Tensor

from nemotron_train.ops import mamba_ssm_core
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes
from nemotron_train.ops.triton_gated_norm import gated_norm, gated_norm_gradients
from nemotron_train.ops.triton_ssd import Kept, Steps, scan, scan_gradients, step_sizes, supports


def mamba_core(
    zxBCdt_SBf: Tensor, weights: CoreWeights, sizes: MixerSizes, documents: Documents | None = None
) -> Tensor:
    """Return what `mamba_core.mamba_core` returns (S B I). Documents, and sizes that the kernels do not support, go to
    the published kernels."""
    # The convolution takes tokens that are a multiple of 8 numbers apart; the published core makes a copy that is.
    if documents is not None or not supports(sizes) or zxBCdt_SBf.shape[-1] % 8:
        return mamba_ssm_core.mamba_core(zxBCdt_SBf, weights, sizes, documents)
    return _MambaCore.apply(zxBCdt_SBf.contiguous(), *weights, sizes)


class _MambaCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zxBCdt: Tensor, *arguments: Any) -> Tensor:
        weights, sizes = CoreWeights(*arguments[:-1]), arguments[-1]
        z, xBC, dt = sizes.split_projection(zxBCdt)
        steps = step_sizes(dt, weights, sizes.chunk)
        y, kept = scan(_convolve(xBC, weights), steps, weights.D_H, sizes)
        out, scale = gated_norm(y.flatten(0, 1), z.flatten(0, 1), weights.norm_I, sizes.groups, sizes.epsilon)
        ctx.save_for_backward(zxBCdt, *weights, *steps, kept.entering, y, scale)
        ctx.sizes = sizes
        return out.view_as(y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        zxBCdt, *rest = ctx.saved_tensors
        weights, kept, (y, scale), sizes = CoreWeights(*rest[:6]), Kept(Steps(*rest[6:8]), rest[8]), rest[9:], ctx.sizes
        z, xBC, dt = sizes.split_projection(zxBCdt)
        d_zxBCdt = torch.empty_like(zxBCdt)
        dz, dxBC, ddt = sizes.split_projection(d_zxBCdt)
        dout, y, z, dz = (t.flatten(0, 1) for t in (dout.contiguous(), y, z, dz))
        dy, d_norm = gated_norm_gradients(dout, y, z, weights.norm_I, scale, dz)
        d_convolved, d_steps = scan_gradients(
            dy.unflatten(0, xBC.shape[:2]), _convolve(xBC, weights), dt, kept, weights, sizes, d_raw_dt=ddt
        )
        _, d_conv, d_conv_bias, _ = causal_conv1d_bwd_function(
            _channels_first(xBC), weights.conv_CK, weights.conv_bias_C, _channels_first(d_convolved),
            None, None, None, _channels_first(dxBC), False, True,
        )  # fmt: skip
        gradients = CoreWeights(d_conv, d_conv_bias, *d_steps, d_norm)
        return d_zxBCdt, *(d.to(weight.dtype) for d, weight in zip(gradients, weights, strict=True)), None


def _convolve(xBC_SBC: Tensor, weights: CoreWeights) -> Tensor:
    convolved = causal_conv1d_fwd_function(
        _channels_first(xBC_SBC), weights.conv_CK, weights.conv_bias_C, None, None, None, True
    )
    return convolved.permute(2, 0, 1)


def _channels_first(t_SBC: Tensor) -> Tensor:
    return t_SBC.permute(1, 2, 0)
