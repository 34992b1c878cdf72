"""How does a sequence that is split over context-parallel ranks get to where all of it is needed?

Attention of the plain layers gathers keys and values; the Mamba scan, which goes through all tokens in order, takes the
whole sequence of a share of the heads. Between the ranks each holds two runs of the sequence (data/sequence_part.py);
what comes out here is in the order of the text. All of it is Megatron-Core's, gradients included.

Source: `megatron.core.ssm.mamba_context_parallel` (0.16.1), whose class needs a package (einops) that its functions do
not.

Shapes: S sequence, s this rank's part of it, B micro-batch, f features, g this rank's share of them.
"""

import torch
from megatron.core.ssm.mamba_context_parallel import (
    _all_to_all_cp2hp,
    _all_to_all_hp2cp,
    _redo_attention_load_balancing,
    _undo_attention_load_balancing,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_sequence(x_sB: Tensor, group: ProcessGroup) -> Tensor:
    """Return the whole sequence (S B ...) to every rank; in the backward pass, gradients of all ranks are summed."""
    return _undo_attention_load_balancing(gather_from_sequence_parallel_region(x_sB, group=group), group.size())


def own_places(seq_length: int, group: ProcessGroup, device: torch.device) -> Tensor:
    """Return the places (s) of this rank's tokens in the sequence."""
    return places_of(seq_length, group.size(), group.rank(), device)


def places_of(seq_length: int, ranks: int, rank: int, device: torch.device) -> Tensor:
    """Return the places (s) of the tokens in the sequence that one of the context-parallel ranks holds."""
    places = torch.arange(seq_length, device=device)
    return _redo_attention_load_balancing(places, ranks).chunk(ranks)[rank] if ranks > 1 else places


def to_features(x_sBf: Tensor, group: ProcessGroup) -> Tensor:
    """Trade this rank's part of the sequence for the whole of it, and all features for a share: rank r gets the r-th of
    equal pieces (S B g)."""
    return _undo_attention_load_balancing(_all_to_all_cp2hp(x_sBf, group), group.size())


def to_sequence(x_SBg: Tensor, group: ProcessGroup) -> Tensor:
    """Undo `to_features` (s B f)."""
    return _all_to_all_hp2cp(_redo_attention_load_balancing(x_SBg, group.size()), group)
