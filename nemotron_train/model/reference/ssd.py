"""What does the state-space layer of Mamba-2 compute? Two definitions: token by token, and in chunks.

Both are written to be read, not to be fast; autograd gives their gradients. The fast forms stand in `ops/`.

Source: Mamba-2, arXiv 2405.21060: the recurrence in section 2.1, the chunks in section 6.

Shapes: B micro-batch, S sequence, H heads, P head dim, G groups of heads that share B and C, N state dim, K chunks, L
tokens of a chunk. A, B, C, D and dt are also the paper's names.
"""

import torch
from torch import Tensor
from torch.nn import functional


def ssd_recurrence(x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, D_H: Tensor) -> Tensor:
    """Run the recurrence one token at a time: the definition.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t        h_{-1} = 0

    Args:
        dt_BSH: step size after softplus, >= 0.
        A_H: decay rate, < 0.
    Returns:
        y_BSHP in x's dtype. The state is float32 whatever the inputs are (float64 for float64 inputs).
    """
    x, dt, A, B_BSHN, C_BSHN, D = _in_state_dtype(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H)
    h_BHPN = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B_BSHN.shape[-1])
    ys = []
    for t in range(x.shape[1]):
        decay_BH = torch.exp(dt[:, t] * A)
        inject_BHPN = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B_BSHN[:, t])
        h_BHPN = decay_BH[..., None, None] * h_BHPN + inject_BHPN
        ys.append(torch.einsum("bhpn,bhn->bhp", h_BHPN, C_BSHN[:, t]) + D[:, None] * x[:, t])
    return torch.stack(ys, dim=1).to(x_BSHP.dtype)


def ssd_chunked(
    x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, D_H: Tensor, *, chunk_size: int
) -> Tensor:
    """Compute the same in chunks: matrix products inside a chunk, the recurrence only from chunk to chunk.

    The whole map from x to y is one lower-triangular matrix per head, with entries C_l . B_s exp(sum of dt A over s <
    t <= l) dt_s. Its blocks on the diagonal are formed as they stand; each block below it is a product of three
    factors: what the chunk of s writes to the state, the decay of the chunks between, and what the chunk of l reads
    from the state.
    """
    seq_length = x_BSHP.shape[1]
    x, dt, A, B_BSHN, C_BSHN, D = _in_state_dtype(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H)
    dx = dt[..., None] * x
    dx, log_decay, B_, C_ = (_cut(t, chunk_size) for t in (dx, dt * A, B_BSHN, C_BSHN))
    cumulative_BKLH = log_decay.cumsum(dim=2)

    # 1. Within each chunk (diagonal blocks): attention without softmax, weighted by the decay from s to l.
    scores_BKLLH = torch.einsum("bklhn,bkshn->bklsh", C_, B_)
    decay_BKLLH = torch.exp(_segment_sums(cumulative_BKLH))
    y_diagonal = torch.einsum("bklsh,bklsh,bkshp->bklhp", scores_BKLLH, decay_BKLLH, dx)

    # 2. What each chunk adds to the state at its end.
    decay_to_end = torch.exp(cumulative_BKLH[:, :, -1:] - cumulative_BKLH)
    added_BKHPN = torch.einsum("bklh,bklhp,bklhn->bkhpn", decay_to_end, dx, B_)

    # 3. The recurrence over chunks: the state each chunk starts from.
    state_BHPN = torch.zeros_like(added_BKHPN[:, 0])
    states = []
    for k in range(added_BKHPN.shape[1]):
        states.append(state_BHPN)
        decay_of_chunk_BH = torch.exp(cumulative_BKLH[:, k, -1])
        state_BHPN = decay_of_chunk_BH[..., None, None] * state_BHPN + added_BKHPN[:, k]

    # 4. What each token reads from the state its chunk started from.
    y_state = torch.einsum("bklhn,bkhpn,bklh->bklhp", C_, torch.stack(states, dim=1), torch.exp(cumulative_BKLH))

    y = (y_diagonal + y_state).flatten(1, 2)[:, :seq_length] + D[:, None] * x
    return y.to(x_BSHP.dtype)


def _in_state_dtype(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, ...]:
    """Convert all to the dtype of the state and give every head its group's B and C."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(heads_per_group, dim=2) for t in (B, C))
    return tuple(t.to(dtype) for t in (x, dt, A, B, C, D))


def _cut(t: Tensor, chunk_size: int) -> Tensor:
    """Cut axis 1 into chunks (B K L ...), filled up with zeros: a token with dt = 0 leaves the state as it is."""
    padding = [0, 0] * (t.dim() - 2) + [0, -t.shape[1] % chunk_size]
    return functional.pad(t, padding).unflatten(1, (-1, chunk_size))


def _segment_sums(cumulative_BKLH: Tensor) -> Tensor:
    """Return the sums over tokens s < t <= l (axes l, s), and -inf where s comes after l."""
    differences = cumulative_BKLH[:, :, :, None] - cumulative_BKLH[:, :, None, :]
    later = torch.ones(differences.shape[2:4], dtype=torch.bool, device=differences.device).triu(1)
    return differences.masked_fill(later[:, :, None], -torch.inf)
