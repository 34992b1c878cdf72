"""The gated norm of Mamba-2, RMSNorm by group of y silu(z), forward and backward, as Triton kernels.

Source: Mamba-2, arXiv 2405.21060, section 7. Shapes: R rows of tokens, G groups, W channels of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 2048  # of the backward pass, over all groups; each goes through many rows and keeps its weights' gradient


def gated_norm(y_RI: Tensor, z_RI: Tensor, weight_I: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the normed rows in the dtype of y, and 1 / rms (R G, float32). z may be a slice of wider rows."""
    rows, inner = y_RI.shape
    out, scale = torch.empty_like(y_RI), y_RI.new_empty(rows, groups, dtype=torch.float32)
    width = inner // groups
    gated_norm_forward[(rows, groups)](
        y_RI, z_RI, weight_I, out, scale, z_RI.stride(0), epsilon,
        inner=inner, W=width, BLOCK=triton.next_power_of_2(width), num_warps=2,
    )  # fmt: skip
    return out, scale


def gated_norm_gradients(
    dout_RI: Tensor, y_RI: Tensor, z_RI: Tensor, weight_I: Tensor, scale_RG: Tensor, dz_RI: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill dz_RI, a slice of rows as wide as those of z, and return the gradients of y and, in float32, the weight."""
    (rows, inner), groups = y_RI.shape, scale_RG.shape[1]
    dy, programs = torch.empty_like(y_RI), max(1, min(rows, _PROGRAMS // groups))
    d_weight = y_RI.new_empty(programs, inner, dtype=torch.float32)
    width = inner // groups
    gated_norm_backward[(programs, groups)](
        dout_RI, y_RI, z_RI, weight_I, scale_RG, dy, dz_RI, d_weight, rows, z_RI.stride(0), dz_RI.stride(0),
        inner=inner, W=width, G=groups, ROWS=triton.cdiv(rows, programs),
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return dy, d_weight.sum(0)


@triton.jit
def gated_norm_forward(
    y, z, weight, out, scale, z_row, epsilon,
    inner: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = group * W + tl.arange(0, BLOCK)
    there = tl.arange(0, BLOCK) < W
    of_z = tl.load(z + row * z_row + columns, mask=there, other=0.0).to(tl.float32)
    gated = tl.load(y + row * inner + columns, mask=there, other=0.0).to(tl.float32) * of_z * tl.sigmoid(of_z)
    rstd = 1.0 / tl.sqrt(tl.sum(gated * gated) / W + epsilon)
    tl.store(scale + row * tl.num_programs(1) + group, rstd)
    normed = gated * rstd * tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * inner + columns, normed.to(out.dtype.element_ty), mask=there)


@triton.jit
def gated_norm_backward(
    dout, y, z, weight, scale, dy, dz, d_weight,
    rows, z_row, dz_row,
    inner: tl.constexpr, W: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0), tl.program_id(1)
    columns = group * W + tl.arange(0, BLOCK)
    there = tl.arange(0, BLOCK) < W
    of_weight = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    of_d_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(ROWS):
        row = (first + i * tl.num_programs(0)).to(tl.int64)
        mask = there & (row < rows)
        of_dout = tl.load(dout + row * inner + columns, mask=mask, other=0.0).to(tl.float32)
        of_y = tl.load(y + row * inner + columns, mask=mask, other=0.0).to(tl.float32)
        of_z = tl.load(z + row * z_row + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(scale + row * G + group, mask=row < rows, other=0.0)
        open_ = tl.sigmoid(of_z)
        gate = of_z * open_
        normed = of_y * gate * rstd
        of_d_weight += of_dout * normed
        d_normed = of_dout * of_weight
        d_gated = (d_normed - normed * (tl.sum(d_normed * normed) / W)) * rstd
        tl.store(dy + row * inner + columns, (d_gated * gate).to(dy.dtype.element_ty), mask=mask)
        of_dz = d_gated * of_y * open_ * (1.0 + of_z * (1.0 - open_))
        tl.store(dz + row * dz_row + columns, of_dz.to(dz.dtype.element_ty), mask=mask)
    tl.store(d_weight + first * inner + columns, of_d_weight, mask=there)
