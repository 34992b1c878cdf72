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

import triton
import triton.language as tl


@triton.jit
def _chunk_rows(chunk, S, Q: tl.constexpr):
    """Positions of a chunk's tokens in the sequence, and which of them are there."""
    rows = chunk * Q + tl.arange(0, Q)
    return rows.to(tl.int64), rows < S


@triton.jit
def _tile(base, rows, row_stride, there, width: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to `width` neighbours in each row, and which of a block of them are there."""
    columns = tl.arange(0, BLOCK)
    return base + rows[:, None] * row_stride + columns[None, :], there[:, None] & (columns < width)[None, :]


@triton.jit
def carry_states(
    value, key, step, decay, entering, out, overlap,
    S, value_s, value_b, key_s, key_b, H, heads_per_group,
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
    value, own_key, other_key, step, decay, D, states, out,
    S, chunks, value_s, value_b, key_s, key_b, out_s, out_b, H, heads_per_group,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """y, or REVERSE, dx, of one chunk and HEADS heads of one group.

    y: value is x, own_key C, other_key B, states those that enter. dx: value is dy, own_key B, other_key C, states the
    gradients of those that leave.
    """
    c, first_head, b = tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2)
    rows, there = _chunk_rows(c, S, Q)
    group = first_head // heads_per_group
    at_own, there_key = _tile(own_key + b * key_b + group * N, rows, key_s, there, N, N)
    at_other, there_key = _tile(other_key + b * key_b + group * N, rows, key_s, there, N, N)
    of_own = tl.load(at_own, mask=there_key, other=0.0)
    keys = tl.dot(of_own, tl.trans(tl.load(at_other, mask=there_key, other=0.0)), input_precision="ieee")
    i = tl.arange(0, Q)
    related = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
    n, p = tl.arange(0, N), tl.arange(0, BLOCK_P)
    for k in range(HEADS):
        h = first_head + k
        of_head = (b * H + h).to(tl.int64) * chunks * Q
        a, dt = tl.load(decay + of_head + rows), tl.load(step + of_head + rows)
        state_at = ((b * chunks + c).to(tl.int64) * H + h) * N * P + n[:, None] * P + p[None, :]
        state = tl.load(states + state_at, mask=(p < P)[None, :], other=0.0)
        at_value, there_value = _tile(value + b * value_b + h * P, rows, value_s, there, P, BLOCK_P)
        of_value = tl.load(at_value, mask=there_value, other=0.0)
        result = tl.dot(of_own, state, input_precision="ieee")
        result *= (tl.exp(tl.load(decay + of_head + c * Q + Q - 1) - a) * dt if REVERSE else tl.exp(a))[:, None]
        distance = a[None, :] - a[:, None] if REVERSE else a[:, None] - a[None, :]
        weights = keys * tl.exp(tl.where(related, distance, float("-inf")))
        weights *= dt[:, None] if REVERSE else dt[None, :]
        result = tl.dot(weights.to(of_value.dtype), of_value, acc=result, input_precision="ieee")
        result += tl.load(D + h) * of_value
        at_out, there_out = _tile(out + b * out_b + h * P, rows, out_s, there, P, BLOCK_P)
        tl.store(at_out, result.to(out.dtype.element_ty), mask=there_out)


@triton.jit
def projection_gradients(
    own, other, own_key, other_key, step, decay, states, out, within, carried, itself,
    S, chunks, own_s, own_b, other_s, other_b, key_s, key_b, out_split, out_s, out_b, H, heads_per_group,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr,
    OF_B: tl.constexpr,
):  # fmt: skip
    """dC, or OF_B, dB, of T tokens of a chunk and one group, summed over HEADS of its heads.

    dC: own is dy, other x, own_key C, other_key B, states those that enter. dB: own is x, other dy, own_key B,
    other_key C, states the gradients of those that leave.

    By token and head [B, H, c Q], the gradient times own_key, which is what the decay on its way gets: `carried` by the
    state, and `within` the chunk from all tokens but the token itself, whose pull on itself does not pass through the
    decay. For dB, where all is in proportion to the token's own dt, that factor is left out of them. `itself` is dy . x
    of the token, for dB times B . C.
    """
    tiles: tl.constexpr = Q // T
    c, tile, b = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(2)
    first_head = tl.program_id(1) * HEADS
    group = first_head // heads_per_group
    split = (first_head % heads_per_group) // HEADS
    rows, there = _chunk_rows(c * tiles + tile, S, T)
    at_key, there_key = _tile(own_key + b * key_b + group * N, rows, key_s, there, N, N)
    of_key = tl.load(at_key, mask=there_key, other=0.0)
    n, p = tl.arange(0, N), tl.arange(0, BLOCK_P)
    gradient = tl.zeros([T, N], dtype=tl.float32)
    for k in range(HEADS):
        h = first_head + k
        of_head = (b * H + h).to(tl.int64) * chunks * Q
        a, dt = tl.load(decay + of_head + rows), tl.load(step + of_head + rows)
        at_own, there_own = _tile(own + b * own_b + h * P, rows, own_s, there, P, BLOCK_P)
        of_own = tl.load(at_own, mask=there_own, other=0.0)
        by_others, by_itself = tl.zeros([T], dtype=tl.float32), tl.zeros([T], dtype=tl.float32)
        for o in range(tiles):
            if (o >= tile) if OF_B else (o <= tile):
                o_rows, o_there = _chunk_rows(c * tiles + o, S, T)
                o_a, o_dt = tl.load(decay + of_head + o_rows), tl.load(step + of_head + o_rows)
                at_other, there_other = _tile(other + b * other_b + h * P, o_rows, other_s, o_there, P, BLOCK_P)
                of_other = tl.load(at_other, mask=there_other, other=0.0)
                at_other_key, there_o_key = _tile(other_key + b * key_b + group * N, o_rows, key_s, o_there, N, N)
                of_other_key = tl.load(at_other_key, mask=there_o_key, other=0.0)
                ahead = rows[:, None] - o_rows[None, :]
                distance = o_a[None, :] - a[:, None] if OF_B else a[:, None] - o_a[None, :]
                related = ahead <= 0 if OF_B else ahead >= 0
                products = tl.dot(of_own, tl.trans(of_other), input_precision="ieee")
                weights = products * tl.exp(tl.where(related, distance, float("-inf")))
                if not OF_B:
                    weights *= o_dt[None, :]
                pulls = tl.dot(of_key, tl.trans(of_other_key), input_precision="ieee") * weights
                by_others += tl.sum(tl.where(ahead == 0, 0.0, pulls), axis=1)
                by_itself += tl.sum(tl.where(ahead == 0, pulls if OF_B else products, 0.0), axis=1)
                if OF_B:
                    weights *= dt[:, None]
                gradient = tl.dot(weights.to(of_own.dtype), of_other_key, acc=gradient, input_precision="ieee")
        tl.store(within + of_head + rows, by_others)
        tl.store(itself + of_head + rows, by_itself)
        state_at = ((b * chunks + c).to(tl.int64) * H + h) * N * P + n[:, None] * P + p[None, :]
        state = tl.load(states + state_at, mask=(p < P)[None, :], other=0.0)
        by_state = tl.dot(of_own, tl.trans(state), input_precision="ieee")
        by_state *= tl.exp(tl.load(decay + of_head + c * Q + Q - 1) - a if OF_B else a)[:, None]
        tl.store(carried + of_head + rows, tl.sum(by_state * of_key, axis=1))
        gradient += by_state * dt[:, None] if OF_B else by_state
    at_out, there_key = _tile(out + split * out_split + b * out_b + group * N, rows, out_s, there, N, N)
    tl.store(at_out, gradient.to(out.dtype.element_ty), mask=there_key)
