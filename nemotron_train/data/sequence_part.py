"""Which tokens of every sample does a context-parallel rank hold?

A sample is cut into 2C equal runs for C ranks, and rank r holds runs r and 2C-1-r. Under a causal mask a token costs as
much attention as there are tokens before it, so a run from the front with its mirror image from the back costs every
rank the same; of C runs in a row the last rank would do nearly twice the mean. It is the order in which Megatron-Core
(`get_batch_on_this_cp_rank`) and Transformer Engine's attention take a sequence apart, and the only one they accept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, cat


@dataclass(frozen=True)
class SequencePart:
    """The part of rank `rank` of `size`; sample lengths are multiples of 2 `size` (plan/rules.py)."""

    rank: int = 0
    size: int = 1

    @property
    def num_runs(self) -> int:
        return 1 if self.size == 1 else 2

    def runs(self, seq_length: int) -> tuple[range, ...]:
        """Return the places of this rank's tokens in a sample, run by run, in the order in which it holds them."""
        if self.size == 1:
            return (range(seq_length),)
        length = seq_length // (2 * self.size)
        return tuple(range(run * length, (run + 1) * length) for run in (self.rank, 2 * self.size - 1 - self.rank))

    def cut_window(self, window: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return this rank's runs out of the S + 1 tokens of a window, each with the label of its last token."""
        runs: Sequence[NDArray[np.int64]] = [window[run.start : run.stop + 1] for run in self.runs(len(window) - 1)]
        return np.concatenate(runs)

    def cut_rows(self, rows_BS: Tensor) -> Tensor:
        """Return this rank's columns of what has one number for every token of a sample."""
        return cat([rows_BS[:, run.start : run.stop] for run in self.runs(rows_BS.shape[1])], dim=1)


WHOLE = SequencePart()
