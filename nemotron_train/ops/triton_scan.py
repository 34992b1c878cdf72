"""The scan of Mamba-2 in chunks, forward and backward, as Triton kernels.

Within a chunk of Q tokens the scan is a masked attention, between chunks a state of N x P numbers a head is carried on.
With a_i the decay from the chunk's start to token i (a sum of dt A <= 0), S the state that enters the chunk and T the
gradient of the one that leaves it:

    y_i   = exp(a_i) C_i S + sum_{j <= i} (C_i . B_j) exp(a_i - a_j) dt_j x_j + D x_i
    dC_i  = exp(a_i) dy_i S' + sum_{j <= i} (dy_i . x_j) exp(a_i - a_j) dt_j B_j
    dB_j  = exp(a_Q - a_j) dt_j x_j T' + sum_{i >= j} (dy_i . x_j) exp(a_i - a_j) dt_j C_i
    dx_j  = dt_j (exp(a_Q - a_j) B_j T + sum_{i >= j} (C_i . B_j) exp(a_i - a_j) dy_i) + D dy_j

States are carried along the sequence by one program a head, in float32; everything else runs over all chunks at once.
dC and dB are one kernel in two roles. Nothing is added up atomically: the same inputs give the same bits.

Source: Mamba-2, arXiv 2405.21060, section 6. Shapes: R = S times micro-batch rows of tokens (token s of sample b is row
s B + b), H heads, G groups, P head dim, N state dim, Q tokens of a chunk, c chunks.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _chunk_rows(chunk: Any, S: Any, Q: tl.constexpr):
    """Positions of a chunk's tokens in the sequence, and which of them are there."""
    rows = chunk * Q + tl.arange(0, Q)
    return rows.to(tl.int64), rows < S


@triton.jit
def _tile(base: Any, rows: Any, row_stride: Any, there: Any, width: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to `width` neighbours in each row, and which of a block of them are there."""
    columns = tl.arange(0, BLOCK)
    return base + rows[:, None] * row_stride + columns[None, :], there[:, None] & (columns < width)[None, :]


@triton.jit
def carry_states(
    value: Any, key: Any, step: Any, decay: Any, entering: Any, out: Any, overlap: Any,
    S: Any, value_s: Any, value_b: Any, key_s: Any, key_b: Any, H: Any, heads_per_group: Any,
    chunks: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Carry one head's state, BLOCK_N of its N rows, along the sequence.

    Forward: `value` is x, `key` is B, out[b, c, h] the state (N P) that enters chunk c. REVERSE: `value` is dy, `key`
    is C, out[b, c, h] the gradient of the state that leaves chunk c, and overlap[b, h, c, part] its product with what
    chunk c hands on of the state that entered it (`entering`).
    """
    part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, p = part * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    state_at, state_there = n[:, None] * P + p[None, :], (p < P)[None, :] & (n < N)[:, None]
    of_head = (b * H + h).to(tl.int64) * chunks * Q
    state = tl.zeros([BLOCK_N, BLOCK_P], dtype=tl.float32)
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        rows, there = _chunk_rows(c, S, Q)
        a = tl.load(decay + of_head + rows)
        last = tl.load(decay + of_head + c * Q + Q - 1)
        at = ((b * chunks + c).to(tl.int64) * H + h) * N * P + state_at
        tl.store(out + at, state.to(out.dtype.element_ty), mask=state_there)
        if REVERSE:
            handed = tl.load(entering + at, mask=state_there, other=0.0).to(tl.float32)
            tl.store(
                overlap + ((b * H + h) * chunks + c) * tl.num_programs(0) + part, tl.sum(state * handed) * tl.exp(last)
            )
            weight = tl.exp(a)
        else:
            weight = tl.exp(last - a) * tl.load(step + of_head + rows)
        at_v, there_v = _tile(value + b * value_b + h * P, rows, value_s, there, P, BLOCK_P)
        v = tl.load(at_v, mask=there_v, other=0.0)
        first_n = key + b * key_b + (h // heads_per_group) * N + part * BLOCK_N
        at_k, there_k = _tile(first_n, rows, key_s, there, BLOCK_N, BLOCK_N)
        k = tl.load(at_k, mask=there_k, other=0.0)
        state = tl.dot(tl.trans(k), (v * weight[:, None]).to(v.dtype), acc=state * tl.exp(last), input_precision="ieee")


@triton.jit
def outputs(
    x: Any, B: Any, C: Any, step: Any, decay: Any, D: Any, entering: Any, y: Any,
    S: Any, chunks: Any, x_s: Any, x_b: Any, y_s: Any, y_b: Any, H: Any, heads_per_group: Any,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """y of one chunk and HEADS heads of one group."""
    c, first_head, b = tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2)
    rows, there = _chunk_rows(c, S, Q)
    group = first_head // heads_per_group
    at_B, there_B = _tile(B + b * x_b + group * N, rows, x_s, there, N, N)
    at_C, _ = _tile(C + b * x_b + group * N, rows, x_s, there, N, N)
    of_C = tl.load(at_C, mask=there_B, other=0.0)
    CB = tl.dot(of_C, tl.trans(tl.load(at_B, mask=there_B, other=0.0)), input_precision="ieee")
    i = tl.arange(0, Q)
    causal = i[:, None] >= i[None, :]
    n, p = tl.arange(0, N), tl.arange(0, BLOCK_P)
    for k in range(HEADS):
        h = first_head + k
        of_head = (b * H + h).to(tl.int64) * chunks * Q
        a, dt = tl.load(decay + of_head + rows), tl.load(step + of_head + rows)
        state_at = ((b * chunks + c).to(tl.int64) * H + h) * N * P + n[:, None] * P + p[None, :]
        state = tl.load(entering + state_at, mask=(p < P)[None, :], other=0.0)
        at_x, there_x = _tile(x + b * x_b + h * P, rows, x_s, there, P, BLOCK_P)
        x_h = tl.load(at_x, mask=there_x, other=0.0)
        y_h = tl.dot(of_C, state, input_precision="ieee") * tl.exp(a)[:, None]
        weights = CB * tl.exp(tl.where(causal, a[:, None] - a[None, :], float("-inf"))) * dt[None, :]
        y_h = tl.dot(weights.to(x_h.dtype), x_h, acc=y_h, input_precision="ieee")
        y_h += tl.load(D + h) * x_h
        at_y, _ = _tile(y + b * y_b + h * P, rows, y_s, there, P, BLOCK_P)
        tl.store(at_y, y_h.to(y.dtype.element_ty), mask=there_x)


@triton.jit
def projection_gradients(
    own: Any, other: Any, own_key: Any, other_key: Any, step: Any, decay: Any, states: Any, out: Any, carried: Any,
    S: Any, chunks: Any, own_s: Any, own_b: Any, other_s: Any, other_b: Any, key_s: Any, key_b: Any,
    out_split: Any, out_s: Any, out_b: Any, H: Any, heads_per_group: Any,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr,
    OF_B: tl.constexpr,
):  # fmt: skip
    """dC, or OF_B, dB, of one chunk and group, summed over HEADS of its heads.

    dC: own is dy, other x, own_key C, other_key B, states those that enter. dB: own is x, other dy, own_key B,
    other_key C, states the gradients of those that leave. carried[b, h, s] is the part of the gradient that comes by
    the state, times own_key.
    """
    c, b = tl.program_id(0), tl.program_id(2)
    first_head = tl.program_id(1) * HEADS
    group = first_head // heads_per_group
    split = (first_head % heads_per_group) // HEADS
    rows, there = _chunk_rows(c, S, Q)
    at_key, there_key = _tile(own_key + b * key_b + group * N, rows, key_s, there, N, N)
    at_other_key, _ = _tile(other_key + b * key_b + group * N, rows, key_s, there, N, N)
    mine = tl.arange(0, Q)
    related = mine[:, None] <= mine[None, :] if OF_B else mine[:, None] >= mine[None, :]
    n, p = tl.arange(0, N), tl.arange(0, BLOCK_P)
    gradient = tl.zeros([Q, N], dtype=tl.float32)
    for k in range(HEADS):
        h = first_head + k
        of_head = (b * H + h).to(tl.int64) * chunks * Q
        a, dt = tl.load(decay + of_head + rows), tl.load(step + of_head + rows)
        at_own, there_p = _tile(own + b * own_b + h * P, rows, own_s, there, P, BLOCK_P)
        at_other, _ = _tile(other + b * other_b + h * P, rows, other_s, there, P, BLOCK_P)
        of_own, of_other = tl.load(at_own, mask=there_p, other=0.0), tl.load(at_other, mask=there_p, other=0.0)
        if OF_B:
            distance = a[None, :] - a[:, None]
            carry = tl.exp(tl.load(decay + of_head + c * Q + Q - 1) - a) * dt
        else:
            distance = a[:, None] - a[None, :]
            carry = tl.exp(a)
        weights = tl.dot(of_own, tl.trans(of_other), input_precision="ieee")
        weights *= tl.exp(tl.where(related, distance, float("-inf")))
        weights *= dt[:, None] if OF_B else dt[None, :]
        of_other_key = tl.load(at_other_key, mask=there_key, other=0.0)
        gradient = tl.dot(weights.to(of_own.dtype), of_other_key, acc=gradient, input_precision="ieee")
        state_at = ((b * chunks + c).to(tl.int64) * H + h) * N * P + n[:, None] * P + p[None, :]
        state = tl.load(states + state_at, mask=(p < P)[None, :], other=0.0)
        by_state = tl.dot(of_own, tl.trans(state), input_precision="ieee") * carry[:, None]
        gradient += by_state
        of_key = tl.load(at_key, mask=there_key, other=0.0)
        tl.store(carried + of_head + rows, tl.sum(by_state * of_key, axis=1))
    at_out, _ = _tile(out + split * out_split + b * out_b + group * N, rows, out_s, there, N, N)
    tl.store(at_out, gradient.to(out.dtype.element_ty), mask=there_key)


@triton.jit
def input_gradients(
    x: Any, B: Any, C: Any, dy: Any, step: Any, decay: Any, D: Any, leaving: Any,
    dx: Any, d_step: Any, d_decay: Any, d_D: Any,
    S: Any, chunks: Any, x_s: Any, x_b: Any, y_s: Any, y_b: Any, H: Any, heads_per_group: Any,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dx of one chunk and HEADS heads of one group.

    And by token: d_step, the gradient of dt where it scales x; d_decay, the gradient of a_i as far as it comes from
    other tokens of the chunk. d_D[b, c, h].
    """
    c, first_head, b = tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2)
    rows, there = _chunk_rows(c, S, Q)
    group = first_head // heads_per_group
    at_B, there_B = _tile(B + b * x_b + group * N, rows, x_s, there, N, N)
    at_C, _ = _tile(C + b * x_b + group * N, rows, x_s, there, N, N)
    of_B = tl.load(at_B, mask=there_B, other=0.0)
    BC = tl.dot(of_B, tl.trans(tl.load(at_C, mask=there_B, other=0.0)), input_precision="ieee")
    j = tl.arange(0, Q)
    later, itself = j[:, None] <= j[None, :], j[:, None] == j[None, :]
    n, p = tl.arange(0, N), tl.arange(0, BLOCK_P)
    for k in range(HEADS):
        h = first_head + k
        of_head = (b * H + h).to(tl.int64) * chunks * Q
        a, dt = tl.load(decay + of_head + rows), tl.load(step + of_head + rows)
        last = tl.load(decay + of_head + c * Q + Q - 1)
        at_x, there_x = _tile(x + b * x_b + h * P, rows, x_s, there, P, BLOCK_P)
        at_dy, _ = _tile(dy + b * y_b + h * P, rows, y_s, there, P, BLOCK_P)
        x_h, dy_h = tl.load(at_x, mask=there_x, other=0.0), tl.load(at_dy, mask=there_x, other=0.0)
        weights = BC * tl.exp(tl.where(later, a[None, :] - a[:, None], float("-inf")))
        # A token's pull on itself does not pass through the decay: left out, not cancelled.
        pull = tl.dot(x_h, tl.trans(dy_h), input_precision="ieee") * tl.where(itself, 0.0, weights) * dt[:, None]
        tl.store(d_decay + of_head + rows, tl.sum(pull, axis=0) - tl.sum(pull, axis=1))
        state_at = ((b * chunks + c).to(tl.int64) * H + h) * N * P + n[:, None] * P + p[None, :]
        state = tl.load(leaving + state_at, mask=(p < P)[None, :], other=0.0)
        d_scaled = tl.dot(of_B, state, input_precision="ieee") * tl.exp(last - a)[:, None]
        d_scaled = tl.dot(weights.to(dy_h.dtype), dy_h, acc=d_scaled, input_precision="ieee")
        tl.store(d_step + of_head + rows, tl.sum(d_scaled * x_h, axis=1))
        d_skip = x_h.to(tl.float32) * dy_h
        tl.store(d_D + (b * chunks + c) * H + h, tl.sum(d_skip))
        dx_h = d_scaled * dt[:, None] + tl.load(D + h) * dy_h
        at_dx, _ = _tile(dx + b * x_b + h * P, rows, x_s, there, P, BLOCK_P)
        tl.store(at_dx, dx_h.to(dx.dtype.element_ty), mask=there_x)
