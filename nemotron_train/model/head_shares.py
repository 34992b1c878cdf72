"""How is a Mamba-2 mixer split over context-parallel ranks? Each takes the convolution and the scan of a share of the
heads, over the whole sequence.

The gate z and the norm stay where the tokens are: they take each token by itself, and a norm's group of channels may
have its heads on several ranks. So only x, B, C and dt travel, and one exchange takes all four. Where there are fewer
groups of heads than ranks, B and C of a group go to each of the ranks that share it. Weights stay whole on every rank,
with the names and checkpoints of one rank; a rank uses its rows of them, and the gradients add up over the ranks.

Source: `MambaContextParallel` of Megatron-Core 0.16, which exchanges z as well and its parts one by one.

Shapes: S sequence, s this rank's part of it, B micro-batch, f features of x, B, C and dt, i inner channels; G groups,
N state dim.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from torch import Tensor, cat
from torch.distributed import ProcessGroup

from nemotron_train.engine.sequence_exchange import to_features, to_sequence
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes


class HeadShares:
    """The shares of the ranks of one context-parallel group; `plan/rules.py` has proved that heads and groups
    divide."""

    def __init__(self, sizes: MixerSizes, group: ProcessGroup) -> None:
        """Args:
        sizes: of the mixer on one tensor-parallel rank.
        """
        self._group, self._ranks, self._whole = group, group.size(), sizes
        groups = max(1, sizes.groups // self._ranks)
        self.sizes = replace(sizes, heads=sizes.heads // self._ranks, groups=groups)  # of a share

    def take(self, xBCdt_sBf: Tensor) -> Tensor:
        """Return x, B, C and dt of this rank's share, for the whole sequence in order."""
        xBC, dt = xBCdt_sBf.split([self._whole.conv_channels, self._whole.heads], dim=-1)
        x, B, C = self._whole.split_channels(xBC)
        by_rank = zip(self._heads(x, -1), self._groups(B, -1), self._groups(C, -1), self._heads(dt, -1), strict=True)
        return to_features(cat(list(chain.from_iterable(by_rank)), dim=-1), self._group)

    def give_back(self, y_SBi: Tensor) -> Tensor:
        """Return all heads' results for this rank's part of the sequence."""
        return to_sequence(y_SBi, self._group)

    def weights(self, weights: CoreWeights) -> CoreWeights:
        """Return this rank's rows of all weights but the norm's."""
        rank = self._group.rank()
        return weights._replace(
            conv_CK=self._conv_rows(weights.conv_CK),
            conv_bias_C=self._conv_rows(weights.conv_bias_C),
            dt_bias_H=self._heads(weights.dt_bias_H, 0)[rank],
            A_H=self._heads(weights.A_H, 0)[rank],
            D_H=self._heads(weights.D_H, 0)[rank],
        )

    def _conv_rows(self, rows: Tensor) -> Tensor:
        rank = self._group.rank()
        x, B, C = self._whole.split_channels(rows, dim=0)
        return cat([self._heads(x, 0)[rank], self._groups(B, 0)[rank], self._groups(C, 0)[rank]])

    def _heads(self, t: Tensor, dim: int) -> Sequence[Tensor]:
        """Cut what belongs to heads into a piece for every rank."""
        return t.chunk(self._ranks, dim)

    def _groups(self, t: Tensor, dim: int) -> Sequence[Tensor]:
        """Cut what belongs to groups of heads into a piece for every rank; ranks that share a group get the same."""
        pieces = t.split(self.sizes.groups * self.sizes.state, dim)
        return [pieces[rank * len(pieces) // self._ranks] for rank in range(self._ranks)]
