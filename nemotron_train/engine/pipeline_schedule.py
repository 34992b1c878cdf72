"""Runs micro-batches forward and backward through Megatron-Core's schedule for the layout (none, 1F1B, interleaved)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from nemotron_train.data.batch import Batch


def run_micro_batches(
    forward_step: Callable,
    batches: Sequence[Iterator[Batch]],
    chunks: Sequence[nn.Module],
    *,
    num_micro_batches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool = False,
) -> list[Any]:
    """Take one step's micro-batches through all model chunks of this rank.

    Args:
        forward_step: see `forward.py`, which writes down what the schedule expects of it.
        batches: for each model chunk an iterator over the same micro-batches.
        seq_length: of whole samples; the schedule works out what sequence and context parallelism leave of it.

    Returns:
        the report of every micro-batch on the last pipeline stage; an empty list elsewhere.
    """
    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(batches) if interleaved else batches[0],
        model=list(chunks),
        num_microbatches=num_micro_batches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
