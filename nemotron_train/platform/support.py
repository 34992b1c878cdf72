"""Can this machine do what the configuration asks for? Asked before any process group starts."""

import importlib.util
import os

import torch

from nemotron_train.config.schema import DocumentBoundary, PrecisionFormat, PrimaryWeights, RunConfig, StateFormat
from nemotron_train.errors import ConfigError
from nemotron_train.plan.pattern import LayerKind, has_layers
from nemotron_train.plan.rank_share import scan_share
from nemotron_train.plan.sizes import convolution_channels
from nemotron_train.platform.device import Platform

GPU_LIBRARIES = {"transformer_engine": "Transformer Engine", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
CONVOLUTION_KERNELS = (2, 4)  # tokens that causal-conv1d's kernels see: least and most
CONVOLUTION_CHANNELS = 8  # it takes multiples


def check_support(config: RunConfig, platform: Platform) -> None:
    """Raise ConfigError for what needs libraries or a device that are not here, or those that are here cannot do."""
    wanted, gpu = config.precision.format, platform.is_cuda
    if config.train.cuda_graphs:
        _check_cuda_graphs(platform)
    if wanted is PrecisionFormat.fp32:
        return  # plain torch everywhere
    if gpu:
        _check_libraries(wanted)
        _check_convolution(config)
    if config.precision.primary_weights is PrimaryWeights.fp8 and not gpu:
        raise ConfigError(
            f"precision.primary_weights=fp8 with precision.format={wanted.value} needs {_on_a_gpu(platform)}. "
            "Set precision.primary_weights=bf16: the emulation quantises bf16 weights."
        )
    cp_size, boundary = config.parallel.context_parallel_size, config.data.document_boundary
    if cp_size > 1 and boundary is DocumentBoundary.reset and gpu:
        # It cuts every document, and not the sample, into two runs a rank.
        raise ConfigError(
            f"data.document_boundary=reset with parallel.context_parallel_size={cp_size}: Transformer Engine's "
            "attention takes only documents whose lengths are multiples of twice the ranks. Set "
            "data.document_boundary=none, parallel.context_parallel_size=1, or precision.format=fp32."
        )
    if config.parallel.overlap_tensor_comm:
        _check_user_buffers(config, platform)
    for key in ("gradients", "moments"):
        if getattr(config.optim, key) is StateFormat.bf16 and not gpu:
            raise ConfigError(f"optim.{key}=bf16 needs the AdamW of {_on_a_gpu(platform)}. Set optim.{key}=fp32 here.")


def _check_libraries(wanted: PrecisionFormat) -> None:
    missing = [name for module, name in GPU_LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"precision.format={wanted.value} on a GPU needs {', '.join(GPU_LIBRARIES.values())}, and not installed: "
            f'{", ".join(missing)}. Install them (pip install "nemotron-train[gpu]"), or set precision.format=fp32, '
            "which runs on plain torch, slowly."
        )


def _check_convolution(config: RunConfig) -> None:
    model, share = config.model, scan_share(config)
    if not has_layers(model.layer_pattern, LayerKind.mamba):
        return
    least, most = CONVOLUTION_KERNELS
    if not least <= model.mamba_conv_kernel <= most:
        raise ConfigError(
            f"model.mamba_conv_kernel={model.mamba_conv_kernel}: the kernels of causal-conv1d see {least} to {most} "
            "tokens. Use one of these, or precision.format=fp32."
        )
    channels = convolution_channels(share)
    if channels % CONVOLUTION_CHANNELS:
        raise ConfigError(
            f"The convolution of a rank has {channels} channels, and causal-conv1d's kernels take multiples of "
            f"{CONVOLUTION_CHANNELS}: {share.mamba_num_heads} of model.mamba_num_heads={model.mamba_num_heads} x "
            f"model.mamba_head_dim={model.mamba_head_dim}, and twice {share.mamba_num_groups} of "
            f"model.mamba_num_groups={model.mamba_num_groups} x model.mamba_state_dim={model.mamba_state_dim}. "
            "Change one of these or how they are split, or set precision.format=fp32."
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


def _check_user_buffers(config: RunConfig, platform: Platform) -> None:
    if not platform.is_cuda:
        raise ConfigError(
            f"parallel.overlap_tensor_comm=true needs {_on_a_gpu(platform)}. "
            "Set parallel.overlap_tensor_comm=false here."
        )
    tp_size, gpus = config.parallel.tensor_parallel_size, torch.cuda.device_count()
    if tp_size > gpus:
        smaller = f", or parallel.tensor_parallel_size to {gpus} or less" if gpus > 1 else ""
        raise ConfigError(
            f"parallel.overlap_tensor_comm=true with parallel.tensor_parallel_size={tp_size}: ranks write into each "
            f"other's memory, and the GPUs of this machine are {gpus}. Set parallel.overlap_tensor_comm=false{smaller}."
        )


def _on_a_gpu(platform: Platform) -> str:
    return f"Transformer Engine on CUDA, and this run is on {platform.device.type}"
