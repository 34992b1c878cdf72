"""Which class implements each part of a layer on this platform: the place to swap one."""

from dataclasses import dataclass

from nemotron_train.engine import plain_layers
from nemotron_train.platform.device import Platform


@dataclass(frozen=True)
class LayerParts:
    """Classes with the constructors Megatron-Core's modules call."""

    name: str  # for the log
    norm: type
    norm_column_linear: type  # RMSNorm + column-parallel linear in one module
    row_linear: type
    core_attention: type


def choose_layer_parts(platform: Platform) -> LayerParts:
    """Plain torch layers; they run on the CPU and on CUDA."""
    return LayerParts(
        name=f"plain torch layers on {platform.device.type}",
        norm=plain_layers.RMSNorm,
        norm_column_linear=plain_layers.NormColumnParallelLinear,
        row_linear=plain_layers.RowParallelLinear,
        core_attention=plain_layers.CausalAttention,
    )
