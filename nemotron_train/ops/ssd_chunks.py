"""What does the scan of `ssd.py` compute for all chunks at once, and in which memory does it work on one of them?

The shapes are those of `ssd.py`; l is the token that reads, s the token that wrote. Factors of one chunk end in an axis
of 1 where they meet head dim or state.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ScanTensors(NamedTuple):
    """The arguments of `ssd`, or their gradients, with tokens first."""

    x_SBHP: Tensor
    dt_SBH: Tensor
    A_H: Tensor
    B_SBGN: Tensor
    C_SBGN: Tensor
    D_H: Tensor


class AllChunks(NamedTuple):
    """What is small beside x, in the compute dtype."""

    dt_KLBGR: Tensor
    log_decay_KLBGR: Tensor  # sum of dt * A from the start of the chunk up to and with the token; <= 0
    B_KXLN: Tensor
    C_KXLN: Tensor
    past_scores_KBG1LL: Tensor  # C_l . B_s for the tokens s before l, and 0 for the others
    own_scores_KLBG1: Tensor  # C_t . B_t of each token t

    def cut(self, t_SBHP: Tensor) -> Tensor:
        """View as (K L B G R P)."""
        chunks, length, _, groups, heads = self.dt_KLBGR.shape
        return t_SBHP.unflatten(2, (groups, heads)).unflatten(0, (chunks, length))

    def factors(self, D_H: Tensor) -> list["ChunkFactors"]:
        """Return each chunk's part in the shapes in which it meets the large tensors."""
        cumulative = self.log_decay_KLBGR
        from_start = _limited_exp_(cumulative.clone())
        D_GR = D_H.to(cumulative.dtype).view(cumulative.shape[3:])
        cumulative_KBGRL = cumulative.permute(0, 2, 3, 4, 1).contiguous()
        tensors = (
            self.dt_KLBGR.unsqueeze(-1),
            torch.addcmul(D_GR, self.own_scores_KLBG1, self.dt_KLBGR).unsqueeze(-1),
            from_start.unsqueeze(-1),
            _limited_exp_(cumulative[:, -1:] - cumulative).unsqueeze(-1),
            from_start[:, -1, ..., None, None],
            cumulative_KBGRL.unsqueeze(-1),
            cumulative_KBGRL.unsqueeze(-2),
            self.past_scores_KBG1LL,
            self.B_KXLN,
            self.C_KXLN,
        )
        return [ChunkFactors(*chunk) for chunk in zip(*(t.unbind() for t in tensors), strict=True)]


def prepare(inputs: ScanTensors, chunk_length: int) -> AllChunks:
    """Compute it from inputs of a whole number of chunks."""
    groups, dtype = inputs.B_SBGN.shape[2], torch.promote_types(inputs.x_SBHP.dtype, torch.float32)
    dt_KLBGR = inputs.dt_SBH.to(dtype).unflatten(2, (groups, -1)).unflatten(0, (-1, chunk_length)).contiguous()
    log_decay_KLBGR = (dt_KLBGR * inputs.A_H.to(dtype).view(groups, -1)).cumsum(1)
    B_KXLN, C_KXLN = (
        t.to(dtype).unflatten(0, (-1, chunk_length)).permute(0, 2, 3, 1, 4).contiguous().flatten(1, 2)
        for t in (inputs.B_SBGN, inputs.C_SBGN)
    )
    by_group = (len(dt_KLBGR), *dt_KLBGR.shape[2:4], -1)
    past_scores = torch.bmm(C_KXLN.flatten(0, 1), B_KXLN.flatten(0, 1).mT).tril_(-1)
    own_scores = (C_KXLN * B_KXLN).sum(-1).view(by_group).permute(0, 3, 1, 2).contiguous()
    past_scores = past_scores.view(*by_group[:3], 1, chunk_length, chunk_length)
    return AllChunks(dt_KLBGR, log_decay_KLBGR, B_KXLN, C_KXLN, past_scores, own_scores.unsqueeze(-1))


class ChunkFactors(NamedTuple):
    """One chunk's part of what is small."""

    dt_LBGR1: Tensor
    own_LBGR1: Tensor  # what a token's y takes of its own x: through the state, without decay, and the skip
    from_start_LBGR1: Tensor  # decay from the state before the chunk to the token
    to_end_LBGR1: Tensor  # decay from the token to the state after the chunk
    of_chunk_BGR11: Tensor  # decay over the whole chunk
    reader_BGRL1: Tensor  # log decay up to token l
    writer_BGR1L: Tensor  # and up to token s
    past_scores_BG1LL: Tensor
    B_XLN: Tensor
    C_XLN: Tensor

    def decay_between_tokens(self, out_BGRLL: Tensor) -> Tensor:
        """Write the decay from token s to token l; 1 where s comes after l, which the scores mask."""
        # Above the diagonal the difference is positive; limited before the exponential, so that nothing overflows.
        return _limited_exp_(torch.sub(self.reader_BGRL1, self.writer_BGR1L, out=out_BGRLL))


def _limited_exp_(log_decay: Tensor) -> Tensor:
    """Turn log decays, in place, into decays within [exp(-40), 1].

    Beside terms of order one exp(-40) = 4e-18 is nothing even in float64. Smaller decays would only bring denormal
    numbers, over which processors are slow: fast-forgetting heads made the matrix products take five times as long.
    """
    return log_decay.clamp_(-40.0, 0.0).exp_()


class ChunkMemory:
    """Memory for the large intermediates of one chunk, used again by the next, in all shapes in which they are read."""

    def __init__(self, all_chunks: AllChunks, head_dim: int) -> None:
        _, length, micro_batch, groups, heads = all_chunks.dt_KLBGR.shape
        new = all_chunks.dt_KLBGR.new_empty
        self.token_shape = (length, micro_batch, groups, heads, head_dim)
        self.u_LBGRP = new(self.token_shape)  # dt * x, what a token writes
        self.u_YLP = by_head(self.u_LBGRP)
        self.work_LBGRP = new(self.token_shape)
        self.work_XLQ = self.work_LBGRP.flatten(3).flatten(1, 2).transpose(0, 1)
        self.mixing_BGRLL = new(micro_batch, groups, heads, length, length)
        self.mixing_YLL = self.mixing_BGRLL.flatten(0, 2)
        self.d_mixing_BGRLL = torch.empty_like(self.mixing_BGRLL)
        self.d_mixing_YLL = self.d_mixing_BGRLL.flatten(0, 2)
        self.of_heads_YLP = new(micro_batch * groups * heads, length, head_dim)
        self.of_heads_LBGRP = heads_by_token(self.of_heads_YLP, self.token_shape)
        self.of_groups_XLQ = new(micro_batch * groups, length, heads * head_dim)
        self.of_groups_LBGRP = self.of_groups_XLQ.view(micro_batch, groups, length, heads, -1).permute(2, 0, 1, 3, 4)


def by_head(t_LBGRP: Tensor) -> Tensor:
    """View contiguous memory as (Y L P)."""
    return t_LBGRP.flatten(1, 3).transpose(0, 1)


def heads_by_token(t: Tensor, token_shape: tuple[int, ...]) -> Tensor:
    """View (... Y L P) as (... L B G R P)."""
    return t.unflatten(-3, token_shape[1:-1]).movedim(-2, -5)
