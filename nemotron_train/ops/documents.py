"""Where do the documents of a micro-batch begin and end, for operations that must not look across?

Kernels take document numbers or cumulative lengths. In plain torch an operation runs on one document after the other:
nothing of one can reach another, not even as a zero times infinity.

Shapes: S sequence, B micro-batch.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


class Documents:
    """The documents of a micro-batch. Handed through Megatron-Core's attention as its `packed_seq_params`."""

    # Megatron-Core itself takes apart only what is packed as "thd" and passes everything else on to the core attention.
    qkv_format = "sbhd"

    def __init__(self, number_BS: Tensor) -> None:
        """Args:
        number_BS: int32, number of each token's document within its sample; rising along S.
        """
        self.number_BS = number_BS.contiguous()

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Return the starts of all documents, sample after sample, and the number of tokens: int32, on the device."""
        starts = self._begins_BS.flatten().nonzero().flatten()
        return torch.cat((starts, starts.new_tensor([self.number_BS.numel()]))).int()

    @cached_property
    def positions_BS(self) -> Tensor:
        """Return the place of every token in its document, from 0."""
        places_BS = torch.arange(self.number_BS.shape[1], device=self.number_BS.device).expand_as(self.number_BS)
        starts_BS = torch.where(self._begins_BS, places_BS, 0).cummax(dim=1).values
        return places_BS - starts_BS

    @cached_property
    def _begins_BS(self) -> Tensor:
        begins_BS = torch.ones_like(self.number_BS, dtype=torch.bool)
        begins_BS[:, 1:] = self.number_BS[:, 1:] != self.number_BS[:, :-1]
        return begins_BS

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Return the tokens of every document, for each sample."""
        rows, seq_length = self.number_BS.shape
        lengths: list[list[int]] = [[] for _ in range(rows)]
        for start, end in pairwise(self.cu_seqlens.tolist()):
            lengths[start // seq_length].append(end - start)
        return lengths

    def run_each(self, operation: Callable[..., Tensor], *tensors_SB: Tensor) -> Tensor:
        """Run an operation on each document and put the results, (S B ...) like the arguments, together."""
        rows = []
        # Split, not sliced: the gradient of a slice is as large as the whole, once for every document.
        for lengths, *row in zip(self.lengths, *(t.split(1, dim=1) for t in tensors_SB), strict=True):
            documents = zip(*(t.split(lengths) for t in row), strict=True)
            rows.append(torch.cat([operation(*parts) for parts in documents]))
        return torch.cat(rows, dim=1)
