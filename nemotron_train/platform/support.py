"""Can this machine do what the configuration asks for? Asked before any process group starts."""

import importlib.util
import os

import torch

from nemotron_train.config.schema import DocumentBoundary, PrecisionFormat, PrimaryWeights, RunConfig, StateFormat
from nemotron_train.errors import ConfigError
from nemotron_train.platform.device import Platform


def check_support(config: RunConfig, platform: Platform) -> None:
    """Raise ConfigError for what needs libraries or a device that are not here, or those that are here cannot do."""
    wanted = config.precision.format
    has_transformer_engine = platform.is_cuda and importlib.util.find_spec("transformer_engine") is not None
    if wanted.is_fp8 and platform.is_cuda and not has_transformer_engine:  # a CPU emulates FP8; a GPU would be wasted
        raise ConfigError(
            f"precision.format={wanted.value} needs {_what_is_missing(platform)}. Set precision.format=bf16 or fp32."
        )
    if config.precision.primary_weights is PrimaryWeights.fp8 and not has_transformer_engine:
        raise ConfigError(
            f"precision.primary_weights=fp8 with precision.format={wanted.value} needs {_what_is_missing(platform)}. "
            "Set precision.primary_weights=bf16: the emulation quantises bf16 weights."
        )
    if config.train.cuda_graphs:
        _check_cuda_graphs(platform)
    if wanted is PrecisionFormat.fp32:
        return
    cp_size, boundary = config.parallel.context_parallel_size, config.data.document_boundary
    if cp_size > 1 and boundary is DocumentBoundary.reset and has_transformer_engine:
        # It cuts every document, and not the sample, into two runs a rank.
        raise ConfigError(
            f"data.document_boundary=reset with parallel.context_parallel_size={cp_size}: Transformer Engine's "
            "attention takes only documents whose lengths are multiples of twice the ranks. Set "
            "data.document_boundary=none, parallel.context_parallel_size=1, or precision.format=fp32."
        )
    if config.parallel.overlap_tensor_comm:
        _check_user_buffers(config, platform, has_transformer_engine)
    for key in ("gradients", "moments"):
        if getattr(config.optim, key) is StateFormat.bf16 and not has_transformer_engine:
            raise ConfigError(
                f"optim.{key}=bf16 needs the AdamW of {_what_is_missing(platform)}. Set optim.{key}=fp32 here."
            )


def _check_cuda_graphs(platform: Platform) -> None:
    if not platform.is_cuda:
        raise ConfigError(
            f"train.cuda_graphs=true needs a GPU, and this run is on {platform.device.type}. "
            "Set train.cuda_graphs=false here."
        )
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        setting = os.environ.get(name, "")
        if "expandable_segments:True" in setting and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
            # NCCL keeps the addresses of what a graph exchanges; Megatron-Core (0.16) refuses the two together.
            raise ConfigError(
                f"train.cuda_graphs=true with {name}={setting}: collectives in a graph would read memory that has "
                "moved. Set NCCL_GRAPH_REGISTER=0 in the environment, or train.cuda_graphs=false."
            )


def _check_user_buffers(config: RunConfig, platform: Platform, has_transformer_engine: bool) -> None:
    if not has_transformer_engine:
        raise ConfigError(
            f"parallel.overlap_tensor_comm=true needs {_what_is_missing(platform)}. "
            "Set parallel.overlap_tensor_comm=false here."
        )
    tp_size, gpus = config.parallel.tensor_parallel_size, torch.cuda.device_count()
    if tp_size > gpus:
        smaller = f", or parallel.tensor_parallel_size to {gpus} or less" if gpus > 1 else ""
        raise ConfigError(
            f"parallel.overlap_tensor_comm=true with parallel.tensor_parallel_size={tp_size}: ranks write into each "
            f"other's memory, and the GPUs of this machine are {gpus}. Set parallel.overlap_tensor_comm=false{smaller}."
        )


def _what_is_missing(platform: Platform) -> str:
    if not platform.is_cuda:
        return f"Transformer Engine on CUDA, and this run is on {platform.device.type}"
    return 'Transformer Engine, which is not installed (pip install "nemotron-train[gpu]")'
