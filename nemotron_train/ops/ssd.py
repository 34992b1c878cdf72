"""How does the state-space scan (SSD) of Mamba-2 run fast in plain torch, forward and backward?

The sequence is cut into chunks. Inside a chunk the scan is a masked matrix product per head (attention without
softmax); from chunk to chunk a state of P x N numbers per head is carried. What is small beside x (decays, scores) is
computed for all chunks at once (`ssd_chunks.py`); what is as large as x is computed chunk by chunk in memory that every
chunk uses again, so that the elementwise passes work in a core's cache. The backward pass is written by hand: autograd
would keep every intermediate, and would expand B and C, which a group of heads shares, to all heads.
`model/reference/ssd.py` has the definition.

Source: Mamba-2, arXiv 2405.21060, section 6.

Shapes: B micro-batch, S sequence, H heads, P head dim, G groups of heads that share B and C, N state dim; R = H/G
heads of a group, K chunks, L tokens of a chunk. A, B, C, D and dt are also the paper's names. Inside, tokens come
first; memory in the order (L B G R P) is, without a copy, one matrix (L, P) for each of the Y = B H heads, and one
matrix (L, Q = R P) for each of the X = B G groups.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_train.ops.ssd_chunks import (
    AllChunks,
    ChunkFactors,
    ChunkMemory,
    ScanTensors,
    by_head,
    heads_by_token,
    prepare,
)


def ssd(
    x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, D_H: Tensor, *, chunk_size: int
) -> Tensor:
    """Scan the sequence: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t h_t + D x_t, from h = 0.

    Args:
        dt_BSH: step size after softplus, >= 0.
        A_H: decay rate, < 0.
        chunk_size: tokens of a chunk, > 0; speed and memory only. 32 is a good choice on CPU for a state of 16 to 64.
    Returns:
        y_BSHP in x's dtype. States and decays are float32 whatever the inputs are (float64 for float64 inputs).
    """
    return _ChunkedScan.apply(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, chunk_size)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, ctx.chunk_size = arguments
        y_SBHP, kept = scan(_tokens_first(inputs), ctx.chunk_size)
        ctx.save_for_backward(*inputs, *kept)
        return y_SBHP.to(inputs[0].dtype).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states, past = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in inputs]
        out = _tokens_first(gradients)
        scan_gradients(dy.transpose(0, 1), _tokens_first(inputs), Kept(states, past), ctx.chunk_size, out=out)
        return *gradients, None


def _tokens_first(tensors: list[Tensor]) -> ScanTensors:
    x, dt, A, B, C, D = tensors
    return ScanTensors(x.transpose(0, 1), dt.transpose(0, 1), A, B.transpose(0, 1), C.transpose(0, 1), D)


class Kept(NamedTuple):
    """What `scan_gradients` wants back from `scan`."""

    states_KXQN: Tensor  # before each chunk; the first, which is 0, is not set
    past_KYLP: Tensor  # what each token reads of the tokens before it


def scan(inputs: ScanTensors, chunk_size: int) -> tuple[Tensor, Kept]:
    """Scan as `ssd` does; return y (S B H P) in the compute dtype."""
    seq_length = len(inputs.x_SBHP)
    inputs, length = _in_whole_chunks(inputs, chunk_size)
    all_chunks = prepare(inputs, length)
    memory = ChunkMemory(all_chunks, inputs.x_SBHP.shape[-1])
    new, (count, groups, _, state_dim) = memory.u_LBGRP.new_empty, all_chunks.B_KXLN.shape
    y_SBHP = new(inputs.x_SBHP.shape)
    kept = Kept(new(count, groups, memory.work_XLQ.shape[-1], state_dim), new(count, *memory.u_YLP.shape))
    x, y = (all_chunks.cut(t).unbind() for t in (inputs.x_SBHP, y_SBHP))
    states, states_by_head = (t.unbind() for t in (kept.states_KXQN, _by_head(kept.states_KXQN, memory)))
    past, past_by_token = kept.past_KYLP.unbind(), heads_by_token(kept.past_KYLP, memory.token_shape).unbind()
    for k, factors in enumerate(all_chunks.factors(inputs.D_H)):
        torch.mul(x[k], factors.dt_LBGR1, out=memory.u_LBGRP)
        factors.decay_between_tokens(memory.mixing_BGRLL).mul_(factors.past_scores_BG1LL)
        torch.bmm(memory.mixing_YLL, memory.u_YLP, out=past[k])
        if k:
            torch.bmm(factors.C_XLN, states[k].mT, out=memory.of_groups_XLQ)
            past_by_token[k].addcmul_(memory.of_groups_LBGRP, factors.from_start_LBGR1)
        torch.addcmul(past_by_token[k], x[k], factors.own_LBGR1, out=y[k])
        if k + 1 < count:
            torch.mul(memory.u_LBGRP, factors.to_end_LBGR1, out=memory.work_LBGRP)
            torch.bmm(memory.work_XLQ.mT, factors.B_XLN, out=states[k + 1])
            if k:
                states_by_head[k + 1].addcmul_(states_by_head[k], factors.of_chunk_BGR11)
    return y_SBHP[:seq_length], kept


def scan_gradients(dy_SBHP: Tensor, inputs: ScanTensors, kept: Kept, chunk_size: int, *, out: ScanTensors) -> None:
    """Write into `out` the gradients of the inputs."""
    seq_length = len(dy_SBHP)
    inputs, length = _in_whole_chunks(inputs, chunk_size)
    all_chunks = prepare(inputs, length)
    if len(inputs.x_SBHP) == seq_length:
        sums = _gradients_chunk_by_chunk(dy_SBHP, inputs, all_chunks, kept, out.x_SBHP)
    else:
        dx_SBHP = torch.empty_like(inputs.x_SBHP)
        sums = _gradients_chunk_by_chunk(_pad(dy_SBHP, len(dx_SBHP)), inputs, all_chunks, kept, dx_SBHP)
        out.x_SBHP.copy_(dx_SBHP[:seq_length])
    dt, own_scores = all_chunks.dt_KLBGR, all_chunks.own_scores_KLBG1
    # A token's cumulative log decay scales up all that it reads of the past and scales down all that it writes for
    # later, so its gradient is dy . past - du . u: a sum over tokens, not over a matrix of tokens by tokens. A
    # token's own part would stand in both terms; it is kept out, so that it cannot drown the rest where decays are
    # strong.
    d_cumulative = sums.past_dot_dy.addcmul_(dt, sums.x_dot_du, value=-1)
    d_cumulative[:, -1] += sums.state_ends_KBGR
    d_log_decay = d_cumulative.flip(1).cumsum(1).flip(1)
    A_GR = inputs.A_H.to(dt.dtype).view(dt.shape[3:])
    ddt = sums.x_dot_du.addcmul_(d_log_decay, A_GR).addcmul_(sums.x_dot_dy, own_scores)
    out.dt_SBH.copy_(ddt.flatten(3).flatten(0, 1)[:seq_length])
    out.A_H.copy_((d_log_decay * dt).sum((0, 1, 2)).flatten())
    out.D_H.copy_(sums.x_dot_dy.sum((0, 1, 2)).flatten())
    for part, d_SBGN in zip(_score_gradients(sums, all_chunks), (out.B_SBGN, out.C_SBGN), strict=True):
        d_SBGN.copy_(part.unflatten(1, dt.shape[2:4]).permute(0, 3, 1, 2, 4).flatten(0, 1)[:seq_length])


class _Sums(NamedTuple):
    """What the loop over chunks gives of the gradients, beside dx."""

    x_dot_dy: Tensor  # K L B G R, like the next two
    x_dot_du: Tensor
    past_dot_dy: Tensor
    scores_KBGLL: Tensor
    B_KXLN: Tensor  # through the states only, like the next one
    C_KXLN: Tensor
    state_ends_KBGR: Tensor  # of the log decay of a whole chunk, by the state after it


def _gradients_chunk_by_chunk(
    dy_SBHP: Tensor, inputs: ScanTensors, all_chunks: AllChunks, kept: Kept, dx_SBHP: Tensor
) -> _Sums:
    """Go through the chunks from the last to the first; write dx."""
    memory = ChunkMemory(all_chunks, dy_SBHP.shape[-1])
    u, work, last = memory.u_LBGRP, memory.work_LBGRP, len(all_chunks.dt_KLBGR) - 1
    per_head, per_group = all_chunks.dt_KLBGR, all_chunks.B_KXLN
    sums = _Sums(
        x_dot_dy=torch.empty_like(per_head),
        x_dot_du=torch.empty_like(per_head),
        past_dot_dy=torch.empty_like(per_head),
        scores_KBGLL=torch.empty_like(all_chunks.past_scores_KBG1LL.squeeze(3)),
        B_KXLN=torch.zeros_like(per_group),
        C_KXLN=torch.zeros_like(per_group),
        state_ends_KBGR=torch.zeros_like(per_head[:, 0]),
    )
    x_dot_dy, x_dot_du, past_dot_dy, d_scores, dB, dC, state_ends = (t.unbind() for t in sums)
    x, dy_by_chunk, dx = (all_chunks.cut(t).unbind() for t in (inputs.x_SBHP, dy_SBHP, dx_SBHP))
    past, states = heads_by_token(kept.past_KYLP, memory.token_shape).unbind(), kept.states_KXQN.unbind()
    d_state, d_state_after = (torch.empty_like(states[0]) for _ in range(2))
    product = torch.empty_like(d_state)
    for k, factors in reversed(list(enumerate(all_chunks.factors(inputs.D_H)))):
        torch.mul(x[k], factors.dt_LBGR1, out=u)
        dy = dy_by_chunk[k].to(u.dtype).contiguous()
        du = _gradient_within_chunk(factors, memory, dy, d_scores[k])
        torch.sum(torch.mul(x[k], dy, out=work), -1, out=x_dot_dy[k])
        torch.sum(torch.mul(past[k], dy, out=work), -1, out=past_dot_dy[k])
        if k < last:
            torch.sum(
                _by_head(torch.mul(d_state_after, states[k + 1], out=product), memory), (-1, -2), out=state_ends[k]
            )
            torch.mul(u, factors.to_end_LBGR1, out=work)
            torch.bmm(memory.work_XLQ, d_state_after, out=dB[k])
            torch.bmm(factors.B_XLN, d_state_after.mT, out=memory.of_groups_XLQ)
            du.addcmul_(memory.of_groups_LBGRP, factors.to_end_LBGR1)
        if k:
            torch.mul(dy, factors.from_start_LBGR1, out=work)
            torch.bmm(memory.work_XLQ, states[k], out=dC[k])
            torch.bmm(memory.work_XLQ.mT, factors.C_XLN, out=d_state)
            if k < last:
                _by_head(d_state, memory).addcmul_(_by_head(d_state_after, memory), factors.of_chunk_BGR11)
            d_state, d_state_after = d_state_after, d_state
        torch.sum(torch.mul(x[k], du, out=work), -1, out=x_dot_du[k])
        dx[k].copy_(torch.mul(du, factors.dt_LBGR1, out=work).addcmul_(dy, factors.own_LBGR1))
    return sums


def _gradient_within_chunk(factors: ChunkFactors, memory: ChunkMemory, dy: Tensor, d_scores_BGLL: Tensor) -> Tensor:
    """Return du (L B G R P) of the later tokens of the chunk, which read it; write the gradient of the scores."""
    dy_YLP = by_head(dy)
    torch.bmm(dy_YLP, memory.u_YLP.mT, out=memory.d_mixing_YLL)
    factors.decay_between_tokens(memory.mixing_BGRLL)
    torch.sum(memory.d_mixing_BGRLL.mul_(memory.mixing_BGRLL), 2, out=d_scores_BGLL)
    memory.mixing_BGRLL.mul_(factors.past_scores_BG1LL)
    torch.bmm(memory.mixing_YLL.mT, dy_YLP, out=memory.of_heads_YLP)
    return memory.of_heads_LBGRP


def _score_gradients(sums: _Sums, all_chunks: AllChunks) -> tuple[Tensor, Tensor]:
    """Return the gradients of B and C (K X L N)."""
    length = sums.scores_KBGLL.shape[-1]
    d_scores = sums.scores_KBGLL.tril_(-1).view(-1, length, length)
    dB_XLN, dC_XLN, B_XLN, C_XLN = (
        t.flatten(0, 1) for t in (sums.B_KXLN, sums.C_KXLN, all_chunks.B_KXLN, all_chunks.C_KXLN)
    )
    d_own_XL1 = (sums.x_dot_dy * all_chunks.dt_KLBGR).sum(4).permute(0, 2, 3, 1).reshape(-1, length, 1)
    dB_XLN.baddbmm_(d_scores.mT, C_XLN).addcmul_(d_own_XL1, C_XLN)
    dC_XLN.baddbmm_(d_scores, B_XLN).addcmul_(d_own_XL1, B_XLN)
    return sums.B_KXLN, sums.C_KXLN


def _by_head(states: Tensor, memory: ChunkMemory) -> Tensor:
    """View (... X Q N) as (... B G R P N)."""
    return states.view(*states.shape[:-3], *memory.token_shape[1:], states.shape[-1])


def _in_whole_chunks(inputs: ScanTensors, chunk_size: int) -> tuple[ScanTensors, int]:
    """Return the inputs with a whole number of chunks, and the length of these."""
    seq_length = len(inputs.x_SBHP)
    length = min(chunk_size, seq_length)
    padded = seq_length + -seq_length % length
    if padded == seq_length:
        return inputs, length
    # A token with dt = 0 neither decays the state nor writes to it, so padding at the end changes nothing before it.
    x, dt, A, B, C, D = inputs
    return ScanTensors(_pad(x, padded), _pad(dt, padded), A, _pad(B, padded), _pad(C, padded), D), length


def _pad(t: Tensor, length: int) -> Tensor:
    return torch.cat((t, t.new_zeros(length - len(t), *t.shape[1:])))
