"""Where this run computes: CUDA with NCCL, or CPU with gloo. Decided once, at start, by what the machine has."""

import os
from dataclasses import dataclass

import torch

from nemotron_train.errors import ConfigError
from nemotron_train.platform.ranks import LaunchedRank


@dataclass(frozen=True)
class Platform:
    device: torch.device
    backend: str  # of torch.distributed

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the work queued on the device, so that a clock read after it measures that work."""
        if self.is_cuda:
            torch.cuda.synchronize()


def choose_platform(me: LaunchedRank) -> Platform:
    """Take this rank's GPU where there are GPUs (CUDA_VISIBLE_DEVICES= hides them), else the CPU.

    Raises:
        ConfigError: a node has GPUs, but fewer than ranks.
    """
    if torch.cuda.is_available():
        if me.local_rank >= torch.cuda.device_count():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            raise ConfigError(
                f"Local rank {me.local_rank} has no GPU: this process sees {torch.cuda.device_count()} "
                f"(CUDA_VISIBLE_DEVICES: {visible}). Start at most one rank per GPU (--nproc-per-node); let every rank "
                "of a Slurm job see all GPUs of its node (srun --gpu-bind=none, not --gpus-per-task); or hide the GPUs "
                "with CUDA_VISIBLE_DEVICES= to train on the CPU."
            )
        torch.cuda.set_device(me.local_rank)
        return Platform(device=torch.device("cuda", me.local_rank), backend="nccl")
    return Platform(device=torch.device("cpu"), backend="gloo")
