"""What do FP8 products compute? Every quantizer of the three recipes in plain torch: the oracle of what runs on a GPU.

A linear layer with input X [T, K] (T tokens), weight W [N, K] and output gradient dY [T, N] is three products. Both
operands of each are quantised; sums are taken in float32, results are stored in bfloat16 (weight gradients are added to
the main gradient as they are):

| product         |                  | summed over | fp8_block, scales for                | fp8_current, fp8_delayed |
|-----------------|------------------|-------------|--------------------------------------|--------------------------|
| forward         | Y  [T, N] = X W' | inputs K    | X by 1x128 (rows), W by 128x128      | X and W each as a whole  |
| data gradient   | dX [T, K] = dY W | outputs N   | dY by 1x128 (rows), W by 128x128     | dY and W                 |
| weight gradient | dW [N, K] = dY'X | tokens T    | dY and X by 128 tokens of one column | dY and X                 |

Blocks always run along the dimension that is summed over, so an activation is quantised twice from the same
high-precision values, along its rows and along its columns; a square weight block serves both of its products.

| format | largest | smallest normal | smallest | significant bits | used for                                        |
|--------|---------|-----------------|----------|------------------|-------------------------------------------------|
| E4M3   | 448     | 2^-6            | 2^-9     | 4                | everything, but not gradients per tensor        |
| E5M2   | 57,344  | 2^-14           | 2^-16    | 3                | dY of fp8_current and fp8_delayed               |

A value is multiplied by its scale in float32, saturated at the largest number (infinities too) and rounded to the
nearest, ties to even; smaller values become 0. NaN stays NaN, whose sign a GPU drops. What is left at a ragged edge is
a smaller block of its own.

Source: Transformer Engine 2.11, the kernels behind its `Float8BlockQuantizer`, `Float8CurrentScalingQuantizer` and
`Float8Quantizer`; `tests/precision/test_emulation_matches_te.py` compares the bytes on a GPU.
"""

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # values that share a scale along one dimension, in fp8_block
_EXPONENT_BITS = 0x7F800000  # of a float32

# Shapes: R rows, C columns of the matrix that is quantised; r, c of its grid of blocks.


class Fp8Format(Enum):
    e4m3 = torch.float8_e4m3fn
    e5m2 = torch.float8_e5m2

    @property
    def largest(self) -> float:
        return torch.finfo(self.value).max


@dataclass(frozen=True)
class Fp8Tensor:
    """A quantised matrix: number = data x scale_inv of its block."""

    data_RC: Tensor  # of the format's dtype
    scale_inv_rc: Tensor  # float32, one for a block; [1, 1] for a tensor with one scale
    block: tuple[int, int]  # rows and columns that share a scale
    format: Fp8Format

    def dequantize(self) -> Tensor:
        """Return the numbers in float32. With scales that are powers of two they are exact."""
        blocks = _in_blocks(self.data_RC.float(), self.block)
        return _whole(blocks * self.scale_inv_rc[:, None, :, None], self.data_RC.shape)


def quantize_rows(x_RC: Tensor, format: Fp8Format, *, power_of_two: bool) -> Fp8Tensor:
    """Quantise with a scale for each 128 neighbours of a row (fp8_block: activations and gradients)."""
    return _quantize_blocks(x_RC, (1, BLOCK), format, power_of_two)


def quantize_columns(x_RC: Tensor, format: Fp8Format, *, power_of_two: bool) -> Fp8Tensor:
    """Quantise with a scale for each 128 neighbours of a column (fp8_block: operands of the weight gradient)."""
    return _quantize_blocks(x_RC, (BLOCK, 1), format, power_of_two)


def quantize_squares(x_RC: Tensor, format: Fp8Format, *, power_of_two: bool) -> Fp8Tensor:
    """Quantise with a scale for each block of 128x128 (fp8_block: weights)."""
    return _quantize_blocks(x_RC, (BLOCK, BLOCK), format, power_of_two)


def quantize_tensor(x_RC: Tensor, format: Fp8Format, *, power_of_two: bool) -> Fp8Tensor:
    """Quantise with one scale, from the tensor's own maximum (fp8_current)."""
    scale = scale_for(largest_magnitude(x_RC), format, power_of_two=power_of_two)
    return quantize_with_scale(x_RC, scale, format)


def quantize_with_scale(x_RC: Tensor, scale: Tensor, format: Fp8Format) -> Fp8Tensor:
    """Quantise with one given scale (fp8_delayed: from the maxima of earlier steps); what is larger saturates."""
    data = (x_RC.float() * scale).clamp(-format.largest, format.largest).to(format.value)
    return Fp8Tensor(data, scale.reciprocal().view(1, 1), (x_RC.shape[0], x_RC.shape[1]), format)


def largest_magnitude(x: Tensor) -> Tensor:
    """Return the largest |x|, a float32 scalar; NaN counts as 0, as in the maxima that a GPU takes."""
    return _largest(x.abs(), tuple(range(x.ndim)))


def scale_for(
    amax: Tensor, format: Fp8Format, *, power_of_two: bool, instead_of_infinity: float = torch.finfo(torch.float32).max
) -> Tensor:
    """Return the factor that takes `amax` to the format's largest number, float32.

    Args:
        amax: largest magnitudes. For 0, where any factor would do, and for infinity the factor is 1.
        power_of_two: round the factor down to a power of two.
        instead_of_infinity: where `amax` is so small that the quotient overflows.
    """
    scale = torch.full_like(amax, format.largest) / amax
    scale = torch.where(torch.isinf(scale), instead_of_infinity, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, 1.0)


def _quantize_blocks(x_RC: Tensor, block: tuple[int, int], format: Fp8Format, power_of_two: bool) -> Fp8Tensor:
    blocks = _in_blocks(x_RC, block)
    scale_rc = scale_for(
        _largest(blocks.abs(), (1, 3)),
        format,
        power_of_two=power_of_two,
        # The kernels of block scaling take the largest number of the input's type here.
        instead_of_infinity=torch.finfo(x_RC.dtype).max,
    )
    scaled = (blocks.float() * scale_rc[:, None, :, None]).clamp_(-format.largest, format.largest)
    return Fp8Tensor(_whole(scaled.to(format.value), x_RC.shape), scale_rc.reciprocal(), block, format)


def _largest(magnitude: Tensor, dims: tuple[int, ...]) -> Tensor:
    amax = magnitude.amax(dims).float()
    if amax.isnan().any():
        amax = magnitude.nan_to_num(nan=0.0, posinf=torch.inf).amax(dims).float()
    return amax


def _in_blocks(x_RC: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] -> [r, rows of a block, c, columns of a block], filled up with zeros at ragged edges."""
    rows, columns = block
    missing = (-x_RC.shape[1] % columns, -x_RC.shape[0] % rows)
    if any(missing):
        x_RC = F.pad(x_RC, (0, missing[0], 0, missing[1]))
    return x_RC.reshape(x_RC.shape[0] // rows, rows, x_RC.shape[1] // columns, columns)


def _whole(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]].contiguous()
