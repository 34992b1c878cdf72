"""Wraps model chunks in Megatron-Core's distributed data parallel and joins its hooks to the pipeline schedule."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

ModelChunk: TypeAlias = DistributedDataParallel  # the name the rest of the house uses


def wrap_in_data_parallel(
    chunks: Sequence[MegatronModule],
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    groups: ProcessGroupCollection,
) -> list[ModelChunk]:
    """Give every chunk gradient buffers that are reduced over data-parallel ranks."""
    # Later chunks of an interleaved pipeline are small: one bucket each. Not over gloo (torch 2.13), which mixes up the
    # weights when a bucket's bfloat16 and float32 parts are gathered in one operation.
    one_bucket = dist.get_backend(groups.dp_cp) != "gloo"
    wrapped = [
        DistributedDataParallel(
            config, ddp_config, chunk, disable_bucketing=one_bucket and index > 0, pg_collection=groups
        )
        for index, chunk in enumerate(chunks)
    ]
    if ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return wrapped


def overwrite_gradients(chunks: Sequence[ModelChunk]) -> None:
    """Let the products of Transformer Engine that write weight gradients into the main gradients overwrite them in a
    step's first micro-batch, and clear the others only: nearly all the gradients' bytes need not be cleared and read.

    Not where layers are recomputed: Transformer Engine takes the second forward pass for the second micro-batch.
    """
    for chunk in chunks:
        overwritten = _overwritten_weights(chunk)
        for weight in overwritten:
            weight.register_post_accumulate_grad_hook(_accumulate_from_now_on)
        for buffer in chunk.buffers:
            others = [parameter.main_grad for parameter in buffer.params if parameter not in overwritten]
            buffer.reset = partial(_clear, overwritten & set(buffer.params), others)


def _overwritten_weights(chunk: ModelChunk) -> set[nn.Parameter]:
    modules = (module for module in chunk.modules() if getattr(module, "fuse_wgrad_accumulation", False))
    return {module.weight for module in modules}


def _clear(overwritten: Iterable[nn.Parameter], gradients: list[Tensor]) -> None:
    for weight in overwritten:
        weight.overwrite_main_grad = True  # with FP8 products it also goes by its own count of micro-batches
    if gradients:
        torch._foreach_zero_(gradients)


def _accumulate_from_now_on(weight: nn.Parameter) -> None:
    weight.overwrite_main_grad = False


def zero_gradients(chunks: Sequence[ModelChunk]) -> None:
    """Clear the gradient buffers before a step."""
    for chunk in chunks:
        chunk.zero_grad_buffer()


@contextmanager
def weights_complete(chunks: Sequence[ModelChunk]) -> Iterator[None]:
    """Make sure that every rank holds whole, current weights: with overlapped gathers they arrive only in the next
    training forward pass."""
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
        # Megatron-Core (0.16) makes an FP8 weight's copy by columns only after gathers that are not forced.
        post_all_gather_processing([parameter for parameter in chunk.parameters() if is_float8tensor(parameter)])
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()
