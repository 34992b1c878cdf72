"""Step sizes dt of the scan and the decay they add up to within a chunk, forward and backward, as Triton kernels.

dt = softplus(raw + bias); a_i = A times the sum of dt from the chunk's start to token i.
Shapes: as in `triton_scan.py`; dt and a are float32 [B, H, c Q]: of each head the tokens side by side, 0 and constant
beyond the sequence's end.
"""

import triton
import triton.language as tl


@triton.jit
def _places(S, H, chunks, raw_s, raw_b, Q: tl.constexpr, BLOCK_H: tl.constexpr):
    """Where a chunk's tile [Q, BLOCK_H] lies, by token in the projection, by head elsewhere; which of it is there."""
    c, heads, b = tl.program_id(0), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.program_id(2)
    rows = (c * Q + tl.arange(0, Q)).to(tl.int64)
    by_token = b * raw_b + rows[:, None] * raw_s + heads[None, :]
    by_head = (b * H + heads)[None, :].to(tl.int64) * chunks * Q + rows[:, None]
    return by_token, by_head, (rows < S)[:, None] & (heads < H)[None, :], heads


@triton.jit
def step_sizes(
    raw, bias, A, step, decay, S, H, chunks, raw_s, raw_b,
    Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    by_token, by_head, there, heads = _places(S, H, chunks, raw_s, raw_b, Q, BLOCK_H)
    u = tl.load(raw + by_token, mask=there, other=0.0).to(tl.float32)
    u += tl.load(bias + heads, mask=heads < H, other=0.0)[None, :]
    # log(1 + exp(u)) without overflow
    dt = tl.maximum(u, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(u)))
    dt = tl.where(there, dt, 0.0)
    a = tl.cumsum(dt * tl.load(A + heads, mask=heads < H, other=0.0)[None, :], axis=0)
    tl.store(step + by_head, dt, mask=(heads < H)[None, :])
    tl.store(decay + by_head, a, mask=(heads < H)[None, :])


@triton.jit
def step_gradients(
    raw, bias, A, step, pulled, received, pulling, handed, itself, overlap,
    d_raw, d_bias, d_A, S, H, chunks, raw_s, raw_b,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of the raw step sizes, and by chunk of bias and A [B, c, H].

    What token k adds to the decay acts on everything that passes it: what tokens at or after k got from tokens before
    it in the chunk (`pulled`, less `pulling`, what tokens at or after k gave) and from the state that entered
    (`received`), what tokens before k handed on to the state that leaves (`handed`), and what was handed on of the
    state as a whole (`overlap`, one number a chunk and head, in parts). A token gives in proportion to its dt: that
    factor is not yet in `pulling`, `handed` and `itself`, what it gave itself.
    """
    by_token, by_head, there, heads = _places(S, H, chunks, raw_s, raw_b, Q, BLOCK_H)
    c, b = tl.program_id(0), tl.program_id(2)
    dt = tl.load(step + by_head, mask=there, other=0.0)
    gave = tl.load(pulling + by_head, mask=there, other=0.0)
    gave_on = tl.load(handed + by_head, mask=there, other=0.0)
    from_here = tl.load(pulled + by_head, mask=there, other=0.0) - gave * dt
    from_here += tl.load(received + by_head, mask=there, other=0.0)
    until_here = gave_on * dt
    d_dA = tl.cumsum(from_here, axis=0, reverse=True) + tl.cumsum(until_here, axis=0) - until_here
    for part in range(PARTS):
        at = ((b * H + heads) * chunks + c) * PARTS + part
        d_dA += tl.load(overlap + at, mask=heads < H, other=0.0)[None, :]
    d_dt = gave + gave_on + tl.load(itself + by_head, mask=there, other=0.0)
    d_dt += d_dA * tl.load(A + heads, mask=heads < H, other=0.0)[None, :]
    u = tl.load(raw + by_token, mask=there, other=0.0).to(tl.float32)
    u += tl.load(bias + heads, mask=heads < H, other=0.0)[None, :]
    d_u = tl.where(there, d_dt * tl.sigmoid(u), 0.0)
    tl.store(d_raw + by_token, d_u.to(d_raw.dtype.element_ty), mask=there)
    at = (b * chunks + c) * H + heads
    tl.store(d_bias + at, tl.sum(d_u, axis=0), mask=heads < H)
    tl.store(d_A + at, tl.sum(tl.where(there, d_dA * dt, 0.0), axis=0), mask=heads < H)
