"""The scan of Mamba-2 on our Triton kernels, forward and backward: cuts the work into programs and starts them.

Source: Mamba-2, arXiv 2405.21060. Shapes: as in `mamba_core.py`; c chunks of Q tokens.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nemotron_train.ops import triton_scan, triton_steps
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes

_MANY_PROGRAMS = 264  # two for each multiprocessor of a Hopper GPU


class Steps(NamedTuple):
    """float32 [B, H, c Q], tokens beyond the sequence included."""

    dt: Tensor
    decay: Tensor  # sum of dt A from the start of the token's chunk


class Kept(NamedTuple):
    """What `scan_gradients` wants back from `scan`."""

    steps: Steps
    entering: Tensor  # states that enter the chunks [B, c, H, N, P]


class _Operands(NamedTuple):
    """What a kernel reads of a token (own) and of the tokens that act on it or that it acts on (other)."""

    own: Tensor  # S B I
    other: Tensor  # S B I
    own_key: Tensor  # B or C: S B (G N)
    other_key: Tensor


def supports(sizes: MixerSizes) -> bool:
    """Whether the kernels' tiles fit: chunk and state powers of two from 16 to 128, at most 128 channels a head."""
    return sizes.chunk in (16, 32, 64, 128) and sizes.state in (16, 32, 64, 128) and sizes.head_dim <= 128


def step_sizes(raw_dt_SBH: Tensor, weights: CoreWeights, chunk: int) -> Steps:
    """Return softplus(raw + bias) and the decay it adds up to."""
    seq, batch, heads = raw_dt_SBH.shape
    chunks = triton.cdiv(seq, chunk)
    shape = (batch, heads, chunks * chunk)
    steps = Steps(*(torch.empty(shape, dtype=torch.float32, device=raw_dt_SBH.device) for _ in range(2)))
    block = min(16, triton.next_power_of_2(heads))
    triton_steps.step_sizes[(chunks, triton.cdiv(heads, block), batch)](
        raw_dt_SBH, weights.dt_bias_H, weights.A_H, *steps, seq, heads, chunks, *raw_dt_SBH.stride()[:2],
        Q=chunk, BLOCK_H=block,
    )  # fmt: skip
    return steps


def scan(xBC_SBC: Tensor, steps: Steps, D_H: Tensor, sizes: MixerSizes) -> tuple[Tensor, Kept]:
    """Return y (S B I), in the dtype of xBC, and what the backward pass needs besides."""
    seq, batch, _ = xBC_SBC.shape
    x, B, C = sizes.split_channels(xBC_SBC)
    y = torch.empty(seq, batch, sizes.inner, dtype=xBC_SBC.dtype, device=xBC_SBC.device)
    entering, _ = _carry(x, B, steps, sizes, entering=None)
    _outputs(_Operands(x, x, C, B), steps, D_H, entering, y, sizes, reverse=False)
    return y, Kept(steps, entering)


def scan_gradients(
    dy_SBI: Tensor,
    xBC_SBC: Tensor,
    raw_dt_SBH: Tensor,
    kept: Kept,
    weights: CoreWeights,
    sizes: MixerSizes,
    *,
    d_raw_dt: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Fill d_raw_dt (S B H); return the gradients of xBC (S B C) and, in float32, of the bias of dt, A and D (H)."""
    seq, batch, _ = xBC_SBC.shape
    x, B, C = sizes.split_channels(xBC_SBC)
    d_xBC = torch.empty_like(xBC_SBC)
    dx, dB, dC = sizes.split_channels(d_xBC)
    chunks, _, _ = _layout(seq, sizes)
    steps, entering = kept
    leaving, overlap = _carry(dy_SBI, C, steps, sizes, entering=entering)
    _outputs(_Operands(dy_SBI, dy_SBI, B, C), steps, weights.D_H, leaving, dx, sizes, reverse=True)
    for_C, for_B = _Operands(dy_SBI, x, C, B), _Operands(x, dy_SBI, B, C)
    pulled, received, dy_times_x = _projection_gradients(for_C, steps, entering, dC, sizes, of_B=False)
    pulling, handed, itself = _projection_gradients(for_B, steps, leaving, dB, sizes, of_B=True)

    d_bias, d_A = (torch.empty(batch, chunks, sizes.heads, dtype=torch.float32, device=dy_SBI.device) for _ in range(2))
    block = min(16, triton.next_power_of_2(sizes.heads))
    triton_steps.step_gradients[(chunks, triton.cdiv(sizes.heads, block), batch)](
        raw_dt_SBH, weights.dt_bias_H, weights.A_H, steps.dt, pulled, received,
        pulling, handed, itself, overlap,
        d_raw_dt, d_bias, d_A, seq, sizes.heads, chunks, *raw_dt_SBH.stride()[:2],
        Q=sizes.chunk, BLOCK_H=block, PARTS=overlap.shape[-1],
    )  # fmt: skip
    return d_xBC, (d_bias.sum((0, 1)), d_A.sum((0, 1)), dy_times_x.sum((0, 2)))


def _outputs(
    of: _Operands, steps: Steps, D_H: Tensor, states: Tensor, out: Tensor, sizes: MixerSizes, *, reverse: bool
) -> None:
    """Fill `out` with y, or with dx; see the kernel."""
    seq, batch, _ = of.own.shape
    chunks, shared, blocks = _layout(seq, sizes)
    heads = _heads_at_once(sizes, chunks * batch)
    triton_scan.outputs[(chunks, sizes.heads // heads, batch)](
        of.own, of.own_key, of.other_key, *steps, D_H, states, out,
        seq, chunks, *of.own.stride()[:2], *of.own_key.stride()[:2], *out.stride()[:2], sizes.heads, shared,
        **blocks, HEADS=heads, REVERSE=reverse, num_warps=8, num_stages=1,
    )  # fmt: skip


def _projection_gradients(
    of: _Operands, steps: Steps, states: Tensor, out: Tensor, sizes: MixerSizes, *, of_B: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `out` with dC, or with dB; return what the kernel calls within, carried and itself."""
    seq, batch, _ = of.own.shape
    chunks, shared, blocks = _layout(seq, sizes)
    tile = min(64, sizes.chunk)
    heads = _heads_at_once(sizes, chunks * batch)
    splits = shared // heads
    sums = out if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    within, carried, itself = (torch.empty_like(steps.dt) for _ in range(3))
    triton_scan.projection_gradients[(chunks * (sizes.chunk // tile), sizes.heads // heads, batch)](
        *of, *steps, states, sums, within, carried, itself,
        seq, chunks, *of.own.stride()[:2], *of.other.stride()[:2], *of.own_key.stride()[:2],
        0 if splits == 1 else sums.stride(0), *sums.stride()[-3:-1], sizes.heads, shared,
        **blocks, T=tile, HEADS=heads, OF_B=of_B, num_warps=4, num_stages=1,
    )  # fmt: skip
    if splits > 1:
        out.copy_(sums.sum(0))
    return within, carried, itself


def _carry(
    value: Tensor, key: Tensor, steps: Steps, sizes: MixerSizes, entering: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the state that enters each chunk [B, c, H, N, P], or, where those are given, the gradient of the state
    that leaves it, and its overlap with what was handed on [B, H, c, parts]; see the kernel."""
    seq, batch, _ = value.shape
    chunks, shared, blocks = _layout(seq, sizes)
    states = value.new_empty(batch, chunks, sizes.heads, sizes.state, sizes.head_dim)
    block = min(64, sizes.state)
    parts = sizes.state // block
    overlap = torch.empty(batch, sizes.heads, chunks, parts, dtype=torch.float32, device=value.device)
    triton_scan.carry_states[(parts, sizes.heads, batch)](
        value, key, *steps, states if entering is None else entering, states, overlap,
        seq, *value.stride()[:2], *key.stride()[:2], sizes.heads, shared,
        chunks=chunks, **blocks, BLOCK_N=block, REVERSE=entering is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return states, overlap


def _layout(seq_length: int, sizes: MixerSizes) -> tuple[int, int, dict[str, int]]:
    """Return the number of chunks, heads of a group, and the kernels' tile sizes."""
    blocks = dict(
        P=sizes.head_dim, N=sizes.state, Q=sizes.chunk, BLOCK_P=max(16, triton.next_power_of_2(sizes.head_dim))
    )
    return triton.cdiv(seq_length, sizes.chunk), sizes.heads // sizes.groups, blocks


def _heads_at_once(sizes: MixerSizes, chunks: int) -> int:
    """Return how many heads of a group one program takes: all, or fewer where that leaves too few programs."""
    heads = sizes.heads // sizes.groups
    while heads % 2 == 0 and chunks * sizes.heads // heads < _MANY_PROGRAMS:
        heads //= 2
    return heads
