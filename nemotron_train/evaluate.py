"""Held-out loss: the training code path on held-out shards, with gradients off."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from nemotron_train.data.batch import Batch
from nemotron_train.engine.wrap import weights_complete
from nemotron_train.loss import MeanLoss
from nemotron_train.runtime import Runtime
from nemotron_train.step import average_over_ranks, run_all

MICRO_BATCHES_AT_ONCE = 32  # about; bounds what the reports hold


def evaluate(run: Runtime, batches: Sequence[Batch]) -> MeanLoss:
    """Average the loss over held-out micro-batches (as many on every rank; padding has loss_mask 0)."""
    pipeline_size = run.plan.layout.pipeline
    batches = pad_to_multiple(batches, pipeline_size)  # the interleaved schedule takes them in rounds
    at_once = -(-MICRO_BATCHES_AT_ONCE // pipeline_size) * pipeline_size
    reports = []
    for chunk in run.chunks:
        chunk.eval()
    with weights_complete(run.chunks), torch.no_grad():
        for start in range(0, len(batches), at_once):
            reports += run_all(run, batches[start : start + at_once], forward_only=True)
    for chunk in run.chunks:
        chunk.train()
    return average_over_ranks(run, reports)


def pad_to_multiple(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Append copies of the last micro-batch that carry no loss until their number is a multiple of `size`."""
    missing = -len(batches) % size
    without_loss = replace(batches[-1], loss_mask_BS=torch.zeros_like(batches[-1].loss_mask_BS))
    return [*batches, *[without_loss] * missing]
