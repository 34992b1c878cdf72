"""What does the model get at once? A micro-batch of B samples of S = seq_length tokens, and which samples fall to
which rank.

Shape letters: B samples of the micro-batch, S tokens of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotron_train.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """One micro-batch. labels_BS[b, s] is the token after tokens_BS[b, s]."""

    tokens_BS: Tensor  # int64
    labels_BS: Tensor  # int64
    loss_mask_BS: Tensor  # float32: 1 = carries loss, 0 = padding
    source_B: Tensor  # int64, position in data.sources
    document_BS: Tensor | None = None  # int32, number of the token's document in its sample; None: not told apart

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            tokens_BS=self.tokens_BS.to(device, non_blocking=True),
            labels_BS=self.labels_BS.to(device, non_blocking=True),
            loss_mask_BS=self.loss_mask_BS.to(device, non_blocking=True),
            source_B=self.source_B.to(device, non_blocking=True),
            document_BS=None if self.document_BS is None else self.document_BS.to(device, non_blocking=True),
        )


def build_batch(
    windows: Sequence[NDArray[np.int64]],
    sources: Sequence[int],
    num_rows: int,
    seq_length: int,
    eod_id: int | None = None,
) -> Batch:
    """Stack windows of S + 1 tokens into a micro-batch of `num_rows` rows; rows without a window carry no loss.

    Args:
        eod_id: the token that ends a document. With it documents are told apart: they get numbers, and the first
            token of a document is not predicted from the last one of the document before.
    """
    rows = np.zeros((num_rows, seq_length + 1), dtype=np.int64)
    for row, window in zip(rows, windows, strict=False):
        row[:] = window
    mask_BS = torch.zeros(num_rows, seq_length, dtype=torch.float32)
    mask_BS[: len(windows)] = 1.0
    source_B = torch.zeros(num_rows, dtype=torch.int64)
    source_B[: len(windows)] = torch.tensor(sources, dtype=torch.int64)
    rows_BS = torch.from_numpy(rows)
    document_BS = None
    if eod_id is not None:
        ends_BS = rows_BS[:, :-1] == eod_id
        ends_BS[len(windows) :] = False  # a row without a window is one document, whatever token fills it
        document_BS = (ends_BS.cumsum(1) - ends_BS.int()).int()
        mask_BS[ends_BS] = 0.0
    return Batch(
        tokens_BS=rows_BS[:, :-1].contiguous(),
        labels_BS=rows_BS[:, 1:].contiguous(),
        loss_mask_BS=mask_BS,
        source_B=source_B,
        document_BS=document_BS,
    )


@dataclass(frozen=True)
class RankShare:
    """Which part of every step this rank reads. Ranks of one model replica (tensor, pipeline) have equal shares."""

    dp_rank: int
    dp_size: int
    micro_batch_size: int

    def samples(self, first_sample: int, global_batch_size: int) -> range:
        """Return this rank's contiguous block of the samples first_sample ... first_sample + global_batch_size - 1.

        Contiguous because every stretch of the interleave has the phase's mixture; every D-th sample might not.
        """
        rest = global_batch_size % (self.dp_size * self.micro_batch_size)
        if rest:
            raise ConfigError(
                f"A global batch of {global_batch_size} samples does not split into micro-batches of "
                f"{self.micro_batch_size} on {self.dp_size} data-parallel ranks ({rest} left over). Change "
                "train.global_batch_size, train.batch_schedule, train.micro_batch_size or the number of ranks."
            )
        each = global_batch_size // self.dp_size
        return range(first_sample + self.dp_rank * each, first_sample + (self.dp_rank + 1) * each)
