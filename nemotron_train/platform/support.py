"""Can this machine do what the configuration asks for? Asked before any process group starts."""

import importlib.util

from nemotron_train.config.schema import PrecisionFormat, RunConfig, StateFormat
from nemotron_train.errors import ConfigError
from nemotron_train.platform.device import Platform


def check_support(config: RunConfig, platform: Platform) -> None:
    """Raise ConfigError for a precision or an optimizer state that needs libraries or a device that are not here, and
    for a layout that can be planned but not trained yet."""
    if config.parallel.context_parallel_size > 1:
        raise ConfigError(
            f"parallel.context_parallel_size={config.parallel.context_parallel_size}: this version plans with it and "
            "cannot train with it yet. Set it to 1."
        )
    wanted = config.precision.format
    has_transformer_engine = platform.is_cuda and importlib.util.find_spec("transformer_engine") is not None
    if wanted.is_fp8 and not has_transformer_engine:
        raise ConfigError(
            f"precision.format={wanted.value} needs {_what_is_missing(platform)}. Set precision.format=bf16 or fp32."
        )
    if wanted is PrecisionFormat.fp32:
        return
    for key in ("gradients", "moments"):
        if getattr(config.optim, key) is StateFormat.bf16 and not has_transformer_engine:
            raise ConfigError(
                f"optim.{key}=bf16 needs the AdamW of {_what_is_missing(platform)}. Set optim.{key}=fp32 here."
            )


def _what_is_missing(platform: Platform) -> str:
    if not platform.is_cuda:
        return f"Transformer Engine on CUDA, and this run is on {platform.device.type}"
    return 'Transformer Engine, which is not installed (pip install "nemotron-train[gpu]")'
