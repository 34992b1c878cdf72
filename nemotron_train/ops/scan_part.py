"""The core of a Mamba-2 mixer without its gated norm, in plain torch: for ranks that hold a share of a norm's heads.

Source: Mamba-2, arXiv 2405.21060. Shapes: as in `mamba_core.py`; e = C + H: xBC and dt.
"""

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.ops.causal_conv import causal_conv_silu
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes
from nemotron_train.ops.ssd import ssd


def conv_scan(xBCdt_SBe: Tensor, weights: CoreWeights, sizes: MixerSizes, documents: Documents | None = None) -> Tensor:
    """Return scan(silu(conv(xBC)), softplus(dt + bias)) (S B I) in the projection's dtype; the norm's weight is unused.

    Inside all is float32 (float64 for float64 inputs). With `documents`, convolution and scan begin anew with each.
    """

    def run(part_SBe: Tensor) -> Tensor:
        xBC_BSC, dt_BSH = part_SBe.transpose(0, 1).split([sizes.conv_channels, sizes.heads], dim=-1)
        xBC_BSC = causal_conv_silu(xBC_BSC, weights.conv_CK, weights.conv_bias_C)
        x, B, C = sizes.split_channels(xBC_BSC)
        B_BSGN, C_BSGN = (t.unflatten(-1, (sizes.groups, sizes.state)) for t in (B, C))
        x_BSHP = x.unflatten(-1, (sizes.heads, sizes.head_dim))
        step_BSH = functional.softplus(dt_BSH + weights.dt_bias_H)
        y_BSHP = ssd(x_BSHP, step_BSH, weights.A_H, B_BSGN, C_BSGN, weights.D_H, chunk_size=sizes.chunk)
        return y_BSHP.flatten(2).transpose(0, 1)

    wide_SBe = xBCdt_SBe.to(torch.promote_types(xBCdt_SBe.dtype, torch.float32))
    y_SBI = run(wide_SBe) if documents is None else documents.run_each(run, wide_SBe)
    return y_SBI.to(xBCdt_SBe.dtype)
