"""What does the model get at once? A micro-batch of B samples of S = seq_length tokens, and which samples, and which
part of each, fall to which rank.

Shape letters: B samples of the micro-batch, S tokens of a sample, s this rank's part of them (sequence_part.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotron_train.data.sequence_part import WHOLE, SequencePart
from nemotron_train.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """One micro-batch. labels_BS[b, s] is the token after tokens_BS[b, s]; under context parallelism they and the mask
    hold this rank's part of each sample."""

    tokens_BS: Tensor  # int64
    labels_BS: Tensor  # int64
    loss_mask_BS: Tensor  # float32: 1 = carries loss, 0 = padding
    source_B: Tensor  # int64, position in data.sources
    document_BS: Tensor | None = None  # int32, each token's document, of the whole sample; None: not told apart

    def to(self, device: torch.device | str) -> "Batch":
        to_gpu = torch.device(device).type == "cuda"

        def moved(t: Tensor) -> Tensor:
            # A copy from memory that is not pinned would wait for all that the GPU still has to do.
            return (t.pin_memory() if to_gpu and not t.is_cuda else t).to(device, non_blocking=True)

        return Batch(
            tokens_BS=moved(self.tokens_BS),
            labels_BS=moved(self.labels_BS),
            loss_mask_BS=moved(self.loss_mask_BS),
            source_B=moved(self.source_B),
            document_BS=None if self.document_BS is None else moved(self.document_BS),
        )

    def copy_from(self, other: "Batch") -> None:
        """Take another micro-batch's contents, of the same shapes, into this one's memory."""
        for mine, new in zip(vars(self).values(), vars(other).values(), strict=True):
            if mine is not None:
                mine.copy_(new)


def build_batch(
    windows: Sequence[NDArray[np.int64]],
    sources: Sequence[int],
    num_rows: int,
    seq_length: int,
    eod_id: int | None = None,
    num_runs: int = 1,
) -> Batch:
    """Stack windows of S + 1 tokens into a micro-batch of `num_rows` rows; rows without a window carry no loss.

    Args:
        seq_length: tokens of a row, labels not counted.
        num_runs: how many runs of equal length a window consists of, each with the label of its last token.
        eod_id: the token that ends a document. With it documents are told apart: they get numbers, and the first
            token of a document is not predicted from the last one of the document before.
    """
    rows = np.zeros((num_rows, seq_length + num_runs), dtype=np.int64)
    for row, window in zip(rows, windows, strict=False):
        row[:] = window
    mask_BS = torch.zeros(num_rows, seq_length, dtype=torch.float32)
    mask_BS[: len(windows)] = 1.0
    source_B = torch.zeros(num_rows, dtype=torch.int64)
    source_B[: len(windows)] = torch.tensor(sources, dtype=torch.int64)
    runs_BRL = torch.from_numpy(rows).view(num_rows, num_runs, -1)
    tokens_BS, labels_BS = (runs.flatten(1).contiguous() for runs in (runs_BRL[..., :-1], runs_BRL[..., 1:]))
    document_BS = None
    if eod_id is not None:
        assert num_runs == 1, "which document a token is in depends on all tokens before it"
        ends_BS = tokens_BS == eod_id
        ends_BS[len(windows) :] = False  # a row without a window is one document, whatever token fills it
        document_BS = (ends_BS.cumsum(1) - ends_BS.int()).int()
        mask_BS[ends_BS] = 0.0
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        loss_mask_BS=mask_BS,
        source_B=source_B,
        document_BS=document_BS,
    )


def take_part(batch: Batch, part: SequencePart) -> Batch:
    """Cut a micro-batch of whole samples. Numbers of documents stay whole: attention and scan look at all of them."""
    if part == WHOLE:
        return batch
    return replace(
        batch,
        tokens_BS=part.cut_rows(batch.tokens_BS),
        labels_BS=part.cut_rows(batch.labels_BS),
        loss_mask_BS=part.cut_rows(batch.loss_mask_BS),
    )


@dataclass(frozen=True)
class RankShare:
    """Which part of every step this rank reads. Ranks of one model replica have the same samples; tensor- and
    pipeline-parallel ones all of each, context-parallel ones a part of each."""

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    part: SequencePart = WHOLE

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
