"""Which code computes each operation of the model? One name chooses all of them, once, when the model is built."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemotron_train.errors import ConfigError
from nemotron_train.ops.cross_entropy import cross_entropy
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.gated_norm import gated_rms_norm
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes, mamba_core
from nemotron_train.ops.scan_part import conv_scan
from nemotron_train.ops.squared_relu import squared_relu


@dataclass(frozen=True)
class Operations:
    """The operations of one implementation, with the signatures and meaning of the functions of their names."""

    name: str  # as it stands in the log
    gated_rms_norm: Callable[..., Tensor]
    mamba_core: Callable[[Tensor, CoreWeights, MixerSizes, Documents | None], Tensor]
    conv_scan: Callable[[Tensor, CoreWeights, MixerSizes, Documents | None], Tensor]
    squared_relu: Callable[[Tensor], Tensor]
    cross_entropy: Callable[..., Tensor]


_TORCH = Operations(
    name="torch",
    gated_rms_norm=gated_rms_norm,
    mamba_core=mamba_core,
    conv_scan=conv_scan,
    squared_relu=squared_relu,
    cross_entropy=cross_entropy,
)


def _mamba_ssm() -> Operations:
    from nemotron_train.ops import mamba_ssm_core, te_squared_relu, triton_cross_entropy  # of GPU machines

    return replace(
        _TORCH,
        name="mamba_ssm",
        gated_rms_norm=mamba_ssm_core.gated_rms_norm,
        mamba_core=mamba_ssm_core.mamba_core,
        conv_scan=mamba_ssm_core.conv_scan,
        squared_relu=te_squared_relu.squared_relu,
        cross_entropy=triton_cross_entropy.cross_entropy,
    )


def _triton() -> Operations:
    from nemotron_train.ops import triton_core

    return replace(_mamba_ssm(), name="triton", mamba_core=triton_core.mamba_core)


_IMPLEMENTATIONS: dict[str, Callable[[], Operations]] = {
    "torch": lambda: _TORCH,
    "mamba_ssm": _mamba_ssm,
    "triton": _triton,
}


def operations(name: str) -> Operations:
    """Return the implementation of this name.

    Raises:
        ConfigError: there is none of this name, or a library that it needs is missing.
    """
    if name not in _IMPLEMENTATIONS:
        raise ConfigError(f"there is no implementation {name!r} of the operations, only {', '.join(_IMPLEMENTATIONS)}.")
    try:
        return _IMPLEMENTATIONS[name]()
    except ImportError as error:
        raise ConfigError(
            f"The implementation {name!r} of the operations needs a library that is not here: {error}. "
            'Install the GPU packages (pip install "nemotron-train[gpu]").'
        ) from error


def best_operations(device: torch.device, dtype: torch.dtype) -> Operations:
    """Return the fastest implementation for weights of `dtype` on `device`; `platform/support.py` has asked for its
    libraries."""
    if device.type == "cpu" or dtype is torch.float32:
        return operations("torch")
    return operations("triton")
