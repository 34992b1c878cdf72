"""The token embedding of CUDA runs, whose gradient is added to the main gradient row by row.

Megatron-Core's own makes a gradient of the whole table in each micro-batch, almost all of it zeros, and adds that to
the main gradient: all 131,072 rows are passed over several times for the few thousand that were looked up. Imported
only where Triton is there.

Shapes: S sequence, B micro-batch, D hidden.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional

from nemotron_train.ops.triton_row_sums import add_rows


class InPlaceEmbedding(LanguageModelEmbedding):
    """Not for a table that an output layer shares: the gradient that comes from there would be lost."""

    word_embeddings: VocabParallelEmbedding

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        words = self.word_embeddings
        self.word_embeddings = _InPlaceWords(
            words.num_embeddings,
            words.embedding_dim,
            init_method=self.config.embedding_init_method,
            reduce_scatter_embeddings=words.reduce_scatter_embeddings,
            config=self.config,
            tp_group=words.tp_group,
        )


class _InPlaceWords(VocabParallelEmbedding):
    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return x [B, S, D]; with sequence parallelism this rank's part of [S, B, D]."""
        if getattr(self.weight, "main_grad", None) is None:
            return super().forward(tokens_BS)
        if self.tp_group.size() == 1:
            x_BSD = _LookUp.apply(self.weight, tokens_BS)
        else:
            row_BS = tokens_BS - self.vocab_start_index
            is_here_BS = (row_BS >= 0) & (row_BS < self.num_embeddings_per_partition)
            x_BSD = _LookUp.apply(self.weight, row_BS.where(is_here_BS, -1))
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(x_BSD.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(x_BSD, group=self.tp_group)


class _LookUp(torch.autograd.Function):
    """Zeros where a row is -1."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, row_BS: Tensor) -> Tensor:
        ctx.save_for_backward(weight, row_BS)
        return functional.embedding(row_BS.clamp(min=0), weight) * (row_BS >= 0)[..., None]

    @staticmethod
    def backward(ctx: Any, dx_BSD: Tensor) -> tuple[Tensor, None]:
        weight, row_BS = ctx.saved_tensors
        add_rows(weight.main_grad, row_BS.flatten(), dx_BSD.flatten(0, 1))
        weight.grad_added_to_main_grad = True
        # Megatron-Core's hook wants a gradient to see that this one has come; with the mark it does not read it.
        return torch.empty_like(weight), None
