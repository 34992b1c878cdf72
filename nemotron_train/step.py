"""One optimizer step: micro-batches forward and backward, gradients reduced, clipped and applied, losses averaged over
all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import tee

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_train.data.batch import Batch
from nemotron_train.engine.optimizer import set_hyperparameters, take_step
from nemotron_train.engine.pipeline_schedule import run_micro_batches
from nemotron_train.engine.wrap import zero_gradients
from nemotron_train.forward import forward_step
from nemotron_train.loss import LossReport, MeanLoss, add_reports, mean_loss
from nemotron_train.plan.lr_curve import learning_rate
from nemotron_train.runtime import Runtime


@dataclass(frozen=True)
class StepResult:
    """The same on every rank."""

    loss: MeanLoss  # before the update
    grad_norm: float  # before clipping; not finite when the step was skipped
    learning_rate: float
    updated: bool  # False: a gradient was not finite, weights and moments are untouched


def train_step(run: Runtime, batches: Sequence[Batch], consumed_tokens: int) -> StepResult:
    """Take one optimizer step.

    Args:
        batches: this data-parallel rank's micro-batches of the step.
        consumed_tokens: tokens of all steps before this one; sets the learning rate.
    """
    config = run.plan.config
    rate = learning_rate(config.lr, config.train.train_tokens, consumed_tokens)
    set_hyperparameters(run.optimizer, config.optim, rate)
    zero_gradients(run.chunks)
    run.optimizer.zero_grad()
    reports = run_all(run, batches, forward_only=False)
    taken = take_step(run.optimizer)
    return StepResult(
        loss=average_over_ranks(run, reports), grad_norm=taken.grad_norm, learning_rate=rate, updated=taken.updated
    )


def run_all(run: Runtime, batches: Sequence[Batch], *, forward_only: bool) -> list[LossReport]:
    """Take micro-batches through this rank's chunks; reports come back on the last pipeline stage."""
    tokens_in_step = count_tokens(run, batches)
    if run.captured is not None and not forward_only:
        return run.captured.run(partial(_run_passes, run), batches, tokens_in_step)
    return _run_passes(run, batches, tokens_in_step, forward_only=forward_only)


def _run_passes(
    run: Runtime, batches: Sequence[Batch], tokens_in_step: Tensor, *, forward_only: bool = False
) -> list[LossReport]:
    num_sources = len(run.plan.config.data.sources)
    on_device = (batch.to(run.platform.device) for batch in batches)
    return run_micro_batches(
        partial(forward_step, num_sources=num_sources, tokens_in_step=tokens_in_step),
        tee(on_device, len(run.chunks)),
        run.chunks,
        num_micro_batches=len(batches),
        micro_batch_size=run.plan.config.train.micro_batch_size,
        seq_length=batches[0].tokens_BS.shape[1] * run.plan.layout.context,
        forward_only=forward_only,
    )


def count_tokens(run: Runtime, batches: Sequence[Batch]) -> Tensor:
    """Count the real tokens of the global batch, the same scalar on every rank; at least 1, for batches of padding."""
    mine = sum(int(batch.loss_mask_BS.sum()) for batch in batches)
    tokens = torch.full(
        (), mine, dtype=torch.int64, device=run.platform.device
    )  # no copy, which would wait for the GPU
    dist.all_reduce(tokens, group=run.groups.dp_cp)
    return tokens.clamp(min=1)


def average_over_ranks(run: Runtime, reports: Sequence[LossReport]) -> MeanLoss:
    """Average micro-batch reports over the global batch; every rank gets the result."""
    # Tensor-parallel ranks of the last stage hold the same losses: one of them counts.
    counted = reports if run.groups.tp.rank() == 0 else ()
    sums = add_reports(counted, len(run.plan.config.data.sources), run.platform.device)
    dist.all_reduce(sums)
    return mean_loss(sums)
