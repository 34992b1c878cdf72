"""Starts torch.distributed and Megatron-Core's process groups for a layout, and ends them where a run did not fail."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeAlias

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemotron_train.engine.megatron_on_cpu import run_megatron_on_cpu
from nemotron_train.errors import ConfigError
from nemotron_train.plan.layout import Layout
from nemotron_train.platform.device import Platform
from nemotron_train.platform.ranks import LaunchedRank

Groups: TypeAlias = ProcessGroupCollection  # the name the rest of the house uses

logger = logging.getLogger(__name__)


@contextmanager
def process_groups(
    layout: Layout, platform: Platform, me: LaunchedRank, *, timeout_seconds: int, seed: int, fingerprint: str = ""
) -> Iterator[Groups]:
    """Hold the process groups of a layout for the length of a `with` block.

    After an error they are left as they are: tearing them down would wait for other ranks, and would close connections
    before this rank has said why it fails.

    Args:
        fingerprint: of all that decides what a rank does; compared before ranks make groups that would not fit
        together.

    Raises:
        ConfigError: the launch has another number of ranks than the layout, or ranks have different fingerprints.
    """
    if me.world_size != layout.world_size:
        raise ConfigError(f"The plan is for {layout.world_size} ranks but {me.world_size} were started.")
    if not platform.is_cuda:
        run_megatron_on_cpu()
    start_torch_distributed(platform, me, timeout_seconds)
    check_same_on_all_ranks(fingerprint)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=timeout_seconds / 60,
        # Gloo copies of the groups are for NCCL runs; on the CPU the groups are gloo's already.
        create_gloo_process_groups=platform.is_cuda,
    )
    # Nothing in this model draws random numbers while it trains; recomputation still saves and restores the generators.
    # Reset, because Megatron-Core keeps the kind of an earlier run in this process, perhaps that for CUDA graphs.
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    yield ProcessGroupCollection.use_mpu_process_groups()
    stop_torch_distributed()


def stop_torch_distributed() -> None:
    """End all process groups, after a run that every rank finished."""
    _forget_fp8_maxima()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _forget_fp8_maxima() -> None:
    """With delayed scaling Transformer Engine reduces the maxima of every layer that it ever ran in this process, over
    the group each had then."""
    if quantization := sys.modules.get("transformer_engine.pytorch.quantization"):
        quantization.FP8GlobalStateManager.reset()


def start_torch_distributed(platform: Platform, me: LaunchedRank, timeout_seconds: int) -> None:
    """Meet the other ranks through the launcher's rendezvous; a run of one rank needs no network at all."""
    timeout = timedelta(seconds=timeout_seconds)
    device_id = platform.device if platform.is_cuda else None
    if me.is_launched:
        dist.init_process_group(
            platform.backend, timeout=timeout, rank=me.rank, world_size=me.world_size, device_id=device_id
        )
    else:
        store = dist.HashStore()
        dist.init_process_group(
            platform.backend, timeout=timeout, rank=0, world_size=1, store=store, device_id=device_id
        )


def check_same_on_all_ranks(fingerprint: str) -> None:
    """Compare a fingerprint across ranks.

    Raises:
        ConfigError: on every rank, naming the ranks that differ from rank 0.
    """
    fingerprints: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(fingerprints, fingerprint)
    different = [rank for rank, other in enumerate(fingerprints) if other != fingerprints[0]]
    if different:
        raise ConfigError(
            f"Ranks {different} have another configuration or other data ({fingerprints[different[0]][:12]}) than "
            f"rank 0 ({fingerprints[0][:12]}). All ranks must see the same recipes, overrides and data."
        )
