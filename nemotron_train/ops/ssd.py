"""How does the state-space scan (SSD) of Mamba-2 run fast in plain torch, forward and backward?

The sequence is cut into chunks. Inside a chunk the scan is a masked matrix product per head (attention without
softmax); between chunks a state of P x N numbers per head is carried by a short loop. The backward pass is written by
hand: autograd would keep every intermediate, and would expand B and C, which a group of heads shares, to all heads.
`model/reference/ssd.py` has the definition.

Source: Mamba-2, arXiv 2405.21060, section 6.

Shapes: B micro-batch, S sequence, H heads, P head dim, G groups of heads that share B and C, N state dim; R = H/G
heads of a group, K chunks, L tokens of a chunk (l the token that reads, s the token that wrote). A, B, C, D and dt
are also the paper's names. Inside, two orders are used, both with K and B in front: "by head" (G R L P), where each
head is one matrix, for what differs between heads, and "by group" (G L R P), where the heads of a group are columns
of one matrix, for products with the shared B and C.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


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
    seq_length = x_BSHP.shape[1]
    chunk_length = min(chunk_size, seq_length)
    tail = -seq_length % chunk_length
    if not tail:
        return _ChunkedScan.apply(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, chunk_length)
    # A token with dt = 0 neither decays the state nor writes to it, so padding at the end changes nothing before it.
    x, B, C = (functional.pad(t, (0, 0, 0, 0, 0, tail)) for t in (x_BSHP, B_BSGN, C_BSGN))
    dt = functional.pad(dt_BSH, (0, 0, 0, tail))
    return _ChunkedScan.apply(x, dt, A_H, B, C, D_H, chunk_length)[:, :seq_length]


class _Chunked(NamedTuple):
    """The inputs cut into chunks, in the compute dtype, and the decays that follow from dt and A."""

    x_KBGRLP: Tensor  # view, by head
    u_KBGRLP: Tensor  # dt * x, what a token writes
    dt_KBGRL: Tensor
    B_XLN: Tensor  # X = K B G: one matrix for each group
    C_XLN: Tensor
    log_decay_KBGRL: Tensor  # sum of dt * A from the start of the chunk up to and with the token; <= 0

    @property
    def decay_from_start(self) -> Tensor:
        """From the state before the chunk to token l; by group, with an axis for P."""
        return _limited_exp_(self.log_decay_KBGRL.clone()).transpose(-1, -2).unsqueeze(-1)

    @property
    def decay_to_end(self) -> Tensor:
        """From token s to the state after the chunk."""
        return _limited_exp_(self.log_decay_KBGRL[..., -1:] - self.log_decay_KBGRL)

    @property
    def decay_of_chunk(self) -> Tensor:
        """Over the whole chunk, with axes for P and N."""
        return _limited_exp_(self.log_decay_KBGRL[..., -1, None, None].clone())

    @property
    def own_scores(self) -> Tensor:
        """C_t . B_t of each token t (K B G 1 L)."""
        return (self.C_XLN * self.B_XLN).sum(-1).view_as(self.dt_KBGRL[:, :, :, 0]).unsqueeze(3)

    def own_factor(self, D_H: Tensor) -> Tensor:
        """What a token's y takes of its own x (K B G R L): through the state, without decay, and the skip."""
        D_GR1 = D_H.to(self.dt_KBGRL.dtype).view(*self.dt_KBGRL.shape[2:4], 1)
        return torch.addcmul(D_GR1, self.own_scores, self.dt_KBGRL)

    def decay_between_tokens(self) -> Tensor:
        """From token s to token l (axes l, s); 1 where s comes after l, which `_past_scores` masks."""
        cum = self.log_decay_KBGRL
        # Above the diagonal the difference is positive; limited before the exponential, so that nothing overflows.
        return _limited_exp_(cum.unsqueeze(-1) - cum.unsqueeze(-2))


def _limited_exp_(log_decay: Tensor) -> Tensor:
    """Turn log decays, in place, into decays within [exp(-40), 1].

    Beside terms of order one exp(-40) = 4e-18 is nothing even in float64. Smaller decays would only bring denormal
    numbers, over which processors are slow: fast-forgetting heads made the matrix products take five times as long.
    """
    return log_decay.clamp_(-40.0, 0.0).exp_()


def _cut(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_length: int) -> _Chunked:
    groups, dtype = B.shape[2], _compute_dtype(x)
    x_KBGRLP = _by_head(x.to(dtype), groups, chunk_length)
    dt_KBGRL = _by_head(dt.to(dtype).unsqueeze(-1), groups, chunk_length).squeeze(-1).contiguous()
    u_KBGRLP = torch.mul(x_KBGRLP, dt_KBGRL.unsqueeze(-1), out=_empty(x_KBGRLP))
    log_decay = (dt_KBGRL * A.to(dtype).view(groups, -1, 1)).cumsum(-1)
    B_XLN, C_XLN = (
        t.to(dtype).unflatten(1, (-1, chunk_length)).permute(1, 0, 3, 2, 4).flatten(0, 2).contiguous() for t in (B, C)
    )
    return _Chunked(x_KBGRLP, u_KBGRLP, dt_KBGRL, B_XLN, C_XLN, log_decay)


def _by_head(t_BSHP: Tensor, groups: int, chunk_length: int) -> Tensor:
    """View (B S H P) as (K B G R L P)."""
    return t_BSHP.unflatten(1, (-1, chunk_length)).unflatten(3, (groups, -1)).permute(1, 0, 3, 4, 2, 5)


def _empty(like: Tensor) -> Tensor:
    """Fresh contiguous memory of a tensor's size: `empty_like` would keep the order of its strides."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _ChunkedScan(torch.autograd.Function):
    """The scan over whole chunks. Kept for the backward: the inputs, what was read of the past, a state a chunk."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk_length: int
    ) -> Tensor:
        chunked = _cut(x, dt, A, B, C, chunk_length)
        states_KBGRPN = _states_before_chunks(chunked)
        past_KBGRLP = _read_past(chunked, states_KBGRPN)
        y = torch.empty_like(x, dtype=past_KBGRLP.dtype)
        y_KBGRLP = _by_head(y, B.shape[2], chunk_length)
        torch.addcmul(past_KBGRLP, chunked.x_KBGRLP, chunked.own_factor(D).unsqueeze(-1), out=y_KBGRLP)
        ctx.save_for_backward(x, dt, A, B, C, D, states_KBGRPN, past_KBGRLP)
        ctx.chunk_length = chunk_length
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states_KBGRPN, past_KBGRLP = ctx.saved_tensors
        return *_gradients(dy, inputs, states_KBGRPN, past_KBGRLP, ctx.chunk_length), None


def _states_before_chunks(c: _Chunked) -> Tensor:
    """Return the state (K B G R P N) that each chunk starts from."""
    states = c.B_XLN.new_empty(*c.u_KBGRLP.shape[:4], c.u_KBGRLP.shape[-1], c.B_XLN.shape[-1])
    states[0] = 0
    written_KBGLRP = _written_to_state(c)
    writers = written_KBGLRP.flatten(4).flatten(0, 2)
    added = torch.bmm(writers.mT, c.B_XLN[: len(writers)]).view_as(states[1:])
    before, after = states.unbind(), states[1:].unbind()
    for added_k, before_k, decay_k, after_k in zip(added, before, c.decay_of_chunk.unbind(), after, strict=False):
        torch.addcmul(added_k, before_k, decay_k, out=after_k)
    return states


def _written_to_state(c: _Chunked) -> Tensor:
    """Return what the tokens of every chunk but the last add to the state after it, decayed; (K-1 B G L R P)."""
    u = c.u_KBGRLP[:-1].transpose(3, 4)
    return torch.mul(u, c.decay_to_end[:-1].transpose(3, 4).unsqueeze(-1), out=_empty(u))


def _read_past(c: _Chunked, states_KBGRPN: Tensor) -> Tensor:
    """Return what each token reads of the tokens before it (K B G R L P): in its chunk, and through the state."""
    mixing_KBGRLL = c.decay_between_tokens().mul_(_past_scores(c))
    past_KBGRLP = torch.bmm(mixing_KBGRLL.flatten(0, 3), c.u_KBGRLP.flatten(0, 3)).view_as(c.u_KBGRLP)
    columns_XRPN = states_KBGRPN.flatten(3, 4).flatten(0, 2)
    from_state = torch.bmm(c.C_XLN, columns_XRPN.mT).view_as(past_KBGRLP.transpose(3, 4))
    return past_KBGRLP.addcmul_(from_state.transpose(3, 4), c.decay_from_start.transpose(3, 4))


def _past_scores(c: _Chunked) -> Tensor:
    """Return C_l . B_s for the tokens s before l of each chunk (K B G 1 L L), and 0 for the others."""
    chunks, micro_batch, groups, _, length, _ = c.u_KBGRLP.shape
    return torch.bmm(c.C_XLN, c.B_XLN.mT).tril_(-1).view(chunks, micro_batch, groups, 1, length, length)


def _gradients(
    dy: Tensor, inputs: list[Tensor], states_KBGRPN: Tensor, past_KBGRLP: Tensor, chunk_length: int
) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B, C, D."""
    x, dt, A, B, C, D = inputs
    c = _cut(x, dt, A, B, C, chunk_length)
    groups, heads, dtype = B.shape[2], c.u_KBGRLP.shape[2:4], past_KBGRLP.dtype
    dy_KBGRLP = _by_head(dy.to(dtype), groups, chunk_length).contiguous()
    du, dB_XLN, dC_XLN = _gradients_within_chunks(c, dy_KBGRLP)
    d_end_KBGR = _add_gradients_through_states(c, states_KBGRPN, dy_KBGRLP, du, dB_XLN, dC_XLN)

    x_dot_du = (c.x_KBGRLP * du).sum(-1)
    x_dot_dy = (c.x_KBGRLP * dy_KBGRLP).sum(-1)
    # A token's cumulative log decay scales up all that it reads of the past and scales down all that it writes for
    # later, so its gradient is dy . past - du . u: a sum over tokens, not over a matrix of tokens by tokens. A
    # token's own part would stand in both terms; it is kept out, so that it cannot drown the rest where decays are
    # strong.
    d_cumulative = (past_KBGRLP * dy_KBGRLP).sum(-1) - c.dt_KBGRL * x_dot_du
    d_cumulative[..., -1] += d_end_KBGR
    d_log_decay = d_cumulative.flip(-1).cumsum(-1).flip(-1)
    d_own_XL1 = (x_dot_dy * c.dt_KBGRL).sum(3).flatten(0, 2).unsqueeze(-1)
    dB_XLN.addcmul_(d_own_XL1, c.C_XLN)
    dC_XLN.addcmul_(d_own_XL1, c.B_XLN)

    dx = torch.empty_like(x, dtype=dtype)
    dx_KBGRLP = torch.mul(du, c.dt_KBGRL.unsqueeze(-1), out=_by_head(dx, groups, chunk_length))
    dx_KBGRLP.addcmul_(dy_KBGRLP, c.own_factor(D).unsqueeze(-1))
    ddt_KBGRL = x_dot_du + d_log_decay * A.to(dtype).view(*heads, 1) + x_dot_dy * c.own_scores
    ddt = ddt_KBGRL.permute(1, 0, 4, 2, 3).reshape(dt.shape)
    dA = (d_log_decay * c.dt_KBGRL).sum((0, 1, 4)).view(A.shape)
    by_group = (*c.u_KBGRLP.shape[:3], chunk_length, -1)
    dB, dC = (t.view(by_group).permute(1, 0, 3, 2, 4).reshape(B.shape) for t in (dB_XLN, dC_XLN))
    dD = x_dot_dy.sum((0, 1, 4)).view(D.shape)
    return tuple(d.to(t.dtype) for d, t in zip((dx, ddt, dA, dB, dC, dD), inputs, strict=True))


def _gradients_within_chunks(c: _Chunked, dy_KBGRLP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return du (K B G R L P), dB and dC (X L N) of what tokens read of the tokens before them in their own chunk."""
    decay_KBGRLL = c.decay_between_tokens()
    dy, u = dy_KBGRLP.flatten(0, 3), c.u_KBGRLP.flatten(0, 3)
    d_mixing_KBGRLL = torch.bmm(dy, u.mT).view_as(decay_KBGRLL)
    d_scores = d_mixing_KBGRLL.mul_(decay_KBGRLL).sum(3).tril_(-1).flatten(0, 2)
    mixing_KBGRLL = decay_KBGRLL.mul_(_past_scores(c))
    du = torch.bmm(mixing_KBGRLL.flatten(0, 3).mT, dy).view_as(dy_KBGRLP)
    return du, torch.bmm(d_scores.mT, c.C_XLN), torch.bmm(d_scores, c.B_XLN)


def _add_gradients_through_states(
    c: _Chunked, states_KBGRPN: Tensor, dy_KBGRLP: Tensor, du_KBGRLP: Tensor, dB_XLN: Tensor, dC_XLN: Tensor
) -> Tensor:
    """Add to du, dB and dC what passes through the states; return the gradient of each chunk's log decay (K B G R)."""
    dy = dy_KBGRLP.transpose(3, 4)
    dy_XLRP = torch.mul(dy, c.decay_from_start, out=_empty(dy)).flatten(4).flatten(0, 2)
    dC_XLN.baddbmm_(dy_XLRP, states_KBGRPN.flatten(3, 4).flatten(0, 2))
    d_states = torch.bmm(dy_XLRP.mT, c.C_XLN).view_as(states_KBGRPN)
    decay = c.decay_of_chunk
    for k in reversed(range(len(d_states) - 1)):
        d_states[k].addcmul_(d_states[k + 1], decay[k])

    d_after = d_states[1:]  # of the state after chunk k, which is the one before chunk k + 1; the last is not read
    d_after_XRPN = d_after.flatten(3, 4).flatten(0, 2)
    count = len(d_after_XRPN)
    dB_XLN[:count].baddbmm_(_written_to_state(c).flatten(4).flatten(0, 2), d_after_XRPN)
    d_written = torch.bmm(c.B_XLN[:count], d_after_XRPN.mT).view_as(dy[:-1])
    du_KBGRLP[:-1].addcmul_(d_written.transpose(3, 4), c.decay_to_end[:-1].unsqueeze(-1))
    d_end_KBGR = torch.zeros_like(decay[..., 0, 0])
    d_end_KBGR[:-1] = (d_after * states_KBGRPN[1:]).sum((-1, -2))
    return d_end_KBGR
