"""The training loss: nats summed over real tokens, counted per source, and their mean over the global batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_train.data.batch import Batch

# Shapes: B micro-batch, S sequence, K sources.


@dataclass(frozen=True)
class LossReport:
    """Sums of one micro-batch, by source."""

    nats_K: Tensor
    tokens_K: Tensor  # real tokens, those with loss_mask 1


@dataclass(frozen=True)
class MeanLoss:
    """Nats per real token of a step or an evaluation, over all ranks; NaN where there was no token."""

    loss: float
    by_source: tuple[float, ...]
    tokens: int


def sum_losses(
    loss_BS: Tensor, *, batch: Batch, num_sources: int, tokens_in_step: Tensor
) -> tuple[Tensor, Tensor, LossReport]:
    """Reduce one micro-batch's token losses.

    Args:
        tokens_in_step: real tokens of the global batch, a scalar.

    Returns:
        what Megatron-Core's schedule takes from a loss function: (this micro-batch's share of the mean loss, to
        differentiate; number of real tokens as an int tensor; report).
    """
    nats_BS = loss_BS * batch.loss_mask_BS
    nats_K = torch.zeros(num_sources, dtype=torch.float32, device=loss_BS.device)
    tokens_K = torch.zeros_like(nats_K)
    nats_K.index_add_(0, batch.source_B, nats_BS.detach().sum(dim=1))
    tokens_K.index_add_(0, batch.source_B, batch.loss_mask_BS.sum(dim=1))
    return (
        nats_BS.sum() / tokens_in_step,
        batch.loss_mask_BS.sum().to(torch.int),
        LossReport(nats_K=nats_K, tokens_K=tokens_K),
    )


def add_reports(reports: Sequence[LossReport], num_sources: int, device: torch.device) -> Tensor:
    """Add up micro-batches into one row of 2K float64 sums, [nats by source, tokens by source]; zeros without
    reports."""
    sums = torch.zeros(2 * num_sources, dtype=torch.float64, device=device)
    for report in reports:
        sums += torch.cat([report.nats_K, report.tokens_K])
    return sums


def mean_loss(sums: Tensor) -> MeanLoss:
    """Divide sums that were added over all ranks."""
    nats, tokens = sums.cpu().double().chunk(2)
    return MeanLoss(
        loss=float(nats.sum() / tokens.sum()),
        by_source=tuple((nats / tokens).tolist()),
        tokens=int(tokens.sum()),
    )
