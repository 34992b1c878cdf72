"""The core of a Mamba-2 mixer with the published kernels (mamba-ssm, causal-conv1d); imported only where they are.

Source: Mamba-2, arXiv 2405.21060. Shapes: as in `mamba_core.py`.
"""

from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
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
