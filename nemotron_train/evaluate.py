"""Held-out loss: the training code path on held-out shards, with gradients off."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from nemotron_train.data.batch import Batch
from nemotron_train.engine.wrap import weights_complete
from nemotron_train.loss import MeanLoss
from nemotron_train.runtime import Runtime
from nemotron_train.step import average_over_ranks, run_all

MICRO_BATCHES_AT_ONCE = 32  # bounds what the reports hold; a multiple of every pipeline size up to 32


def evaluate(run: Runtime, batches: Sequence[Batch]) -> MeanLoss:
    """Average the loss over held-out micro-batches (as many on every rank; padding has loss_mask 0)."""
    batches = pad_to_multiple(batches, run.plan.layout.pipeline)  # the interleaved schedule takes them in rounds
    reports = []
    for chunk in run.chunks:
        chunk.eval()
    with weights_complete(run.chunks), torch.no_grad():
        for start in range(0, len(batches), MICRO_BATCHES_AT_ONCE):
            reports += run_all(run, batches[start : start + MICRO_BATCHES_AT_ONCE], forward_only=True)
    for chunk in run.chunks:
        chunk.train()
    return average_over_ranks(run, reports)


def pad_to_multiple(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Append copies of the last micro-batch that carry no loss until their number is a multiple of `size`."""
    missing = -len(batches) % size
    without_loss = replace(batches[-1], loss_mask_BS=torch.zeros_like(batches[-1].loss_mask_BS))
    return [*batches, *[without_loss] * missing]
