"""The core of a Mamba-2 mixer with the published kernels (mamba-ssm, causal-conv1d), as one operation and as its two
parts; imported only where they are.

Source: Mamba-2, arXiv 2405.21060. Shapes: as in `mamba_core.py` and `scan_part.py`.
"""

from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from torch import Tensor

from nemotron_train.ops.documents import Documents
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes


def mamba_core(
    zxBCdt_SBf: Tensor, weights: CoreWeights, sizes: MixerSizes, documents: Documents | None = None
) -> Tensor:
    """Return what `mamba_core.mamba_core` returns (S B I)."""
    y_BSI = mamba_split_conv1d_scan_combined(
        zxBCdt_SBf.transpose(0, 1).contiguous(),
        weights.conv_CK,
        weights.conv_bias_C,
        weights.dt_bias_H,
        weights.A_H,
        D=weights.D_H,
        chunk_size=sizes.chunk,
        seq_idx=None if documents is None else documents.number_BS,
        activation="silu",
        rmsnorm_weight=weights.norm_I,
        rmsnorm_eps=sizes.epsilon,
        headdim=sizes.head_dim,
        ngroups=sizes.groups,
        norm_before_gate=False,
    )
    return y_BSI.transpose(0, 1).contiguous()


def conv_scan(xBCdt_SBe: Tensor, weights: CoreWeights, sizes: MixerSizes, documents: Documents | None = None) -> Tensor:
    """Return what `scan_part.conv_scan` returns (S B I)."""
    number_BS = None if documents is None else documents.number_BS
    xBC, dt = xBCdt_SBe.split([sizes.conv_channels, sizes.heads], dim=-1)
    # Contiguous: the kernel takes tokens that are a multiple of 8 numbers apart, which dt behind xBC would prevent.
    xBC_BCS = causal_conv1d_fn(
        xBC.contiguous().permute(1, 2, 0), weights.conv_CK, weights.conv_bias_C, number_BS, activation="silu"
    )
    x, B, C = sizes.split_channels(xBC_BCS.transpose(1, 2))
    y_BSHP = mamba_chunk_scan_combined(
        x.unflatten(-1, (sizes.heads, sizes.head_dim)),
        dt.transpose(0, 1),
        weights.A_H,
        B.unflatten(-1, (sizes.groups, sizes.state)),
        C.unflatten(-1, (sizes.groups, sizes.state)),
        chunk_size=sizes.chunk,
        D=weights.D_H,
        dt_bias=weights.dt_bias_H,
        dt_softplus=True,
        seq_idx=number_BS,
    )
    return y_BSHP.flatten(2).transpose(0, 1).contiguous()


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, num_groups: int, epsilon: float) -> Tensor:
    """Return what `gated_norm.gated_rms_norm` returns."""
    group_size = weight.numel() // num_groups
    return rmsnorm_fn(y, weight, None, z=z, eps=epsilon, group_size=group_size, norm_before_gate=False)
