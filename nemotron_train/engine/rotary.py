"""By which angles are queries and keys rotated? Megatron-Core's `RotaryEmbedding`, for this rank's part of the sample.

Angles count from the sample's first token, also where a sample has several documents: scores depend on distances
alone.

Source: RoFormer, arXiv 2104.09864; channel i turns together with channel i + P/2, as in Megatron-Core and Llama.

Shapes: s this rank's part of the sequence, P head dim.
"""

from functools import lru_cache

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron_train.engine.sequence_exchange import places_of


def rotary_angles(base: float, head_dim: int, length: int, group: ProcessGroup) -> Tensor:
    """Return the angles (s 1 1 P), in float32, of the tokens that this rank of the context-parallel group holds.

    Args:
        length: of this rank's part of the sequence.
    """
    return _angles(base, head_dim, length * group.size(), group.size(), group.rank())


@lru_cache(maxsize=2)  # all layers and micro-batches ask for the same, evaluation perhaps for another length
def _angles(base: float, head_dim: int, seq_length: int, ranks: int, rank: int) -> Tensor:
    angles_S11P = RotaryEmbedding(head_dim, rotary_percent=1.0, rotary_base=base).get_emb(seq_length)
    return angles_S11P[places_of(seq_length, ranks, rank, angles_S11P.device)].to(torch.float32)
