"""Are the quantizers what their tables say? The oracles are bytes worked out by hand, and a search through all codes in
float64."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotron_train.precision import fp8_reference as fp8
from nemotron_train.precision.fp8_reference import Fp8Format, Fp8Tensor

E4M3, E5M2 = Fp8Format.e4m3, Fp8Format.e5m2
INF, NAN = math.inf, math.nan

# value -> byte: sign, exponent (bias 7 or 15), mantissa (3 or 2 bits)
BYTES = [
    (E4M3, 1.0, 0b0_0111_000),
    (E4M3, -1.125, 0b1_0111_001),
    (E4M3, 17.0, 0b0_1011_000),  # half way between 16 and 18: the even one
    (E4M3, 19.0, 0b0_1011_010),  # half way between 18 and 20
    (E4M3, 448.0, 0b0_1111_110),
    (E4M3, 1e6, 0b0_1111_110),
    (E4M3, -INF, 0b1_1111_110),
    (E4M3, NAN, 0b0_1111_111),
    (E4M3, 2**-9, 0b0_0000_001),
    (E4M3, 2**-10, 0b0_0000_000),  # half of the smallest: to the even zero
    (E4M3, 1.01 * 2**-10, 0b0_0000_001),
    (E4M3, 0.9375 * 2**-6, 0b0_0001_000),  # half way between the largest subnormal and the smallest normal number
    (E5M2, 1.25, 0b0_01111_01),
    (E5M2, 4.5, 0b0_10001_00),  # half way between 4 and 5
    (E5M2, 57344.0, 0b0_11110_11),
    (E5M2, 61440.0, 0b0_11110_11),
    (E5M2, INF, 0b0_11110_11),
    (E5M2, -(2**-16), 0b1_00000_01),
    (E5M2, 2**-17, 0b0_00000_00),
]


@pytest.mark.parametrize(("format", "value", "byte"), BYTES)
def test_a_value_becomes_the_byte_worked_out_by_hand(format: Fp8Format, value: float, byte: int) -> None:
    """Fails if a cast overflows instead of saturating, rounds another way, or flushes subnormal numbers."""
    quantised = fp8.quantize_with_scale(torch.tensor([[value]]), torch.tensor(1.0), format)
    assert int(quantised.data_RC.view(torch.uint8)) == byte


@pytest.mark.parametrize(
    ("format", "power_of_two", "amax", "scale"),
    [
        (E4M3, False, 3.5, 128.0),
        (E4M3, True, 3.5, 128.0),
        (E4M3, True, 3.6, 64.0),  # 124.4 rounded down
        (E4M3, False, 448.0 * 3, float(np.float32(1) / np.float32(3))),
        (E5M2, True, 1.0, 32768.0),
        (E5M2, False, 1.0, 57344.0),
        (E4M3, False, 0.0, 1.0),
        (E4M3, True, INF, 1.0),
        (E4M3, True, NAN, 1.0),
        (E4M3, False, 1e-40, float(torch.finfo(torch.float32).max)),  # the quotient overflows
        (E4M3, True, 1e-40, 2.0**127),
    ],
)
def test_scales_are_the_closed_form(format: Fp8Format, power_of_two: bool, amax: float, scale: float) -> None:
    """Fails if an edge of the scale (zero, infinity, overflow) or its rounding moves."""
    found = fp8.scale_for(torch.tensor([amax]), format, power_of_two=power_of_two)
    assert found.item() == scale


def test_an_infinite_block_scale_becomes_the_largest_number_of_the_inputs_type() -> None:
    """Fails if block scaling of bfloat16 takes float32's largest number where the quotient overflows."""
    tiny = torch.full((1, 4), 1e-38, dtype=torch.bfloat16)
    block = fp8.quantize_rows(tiny, E4M3, power_of_two=False)
    assert block.scale_inv_rc.item() == (1 / torch.tensor(torch.finfo(torch.bfloat16).max)).item()


def all_codes(format: Fp8Format) -> NDArray[np.float64]:
    """The number of each of the 128 codes without sign; NaN where the code is none."""
    mantissa_bits, bias, last = (3, 7, 0x7E) if format is E4M3 else (2, 15, 0x7B)
    numbers = np.full(128, np.nan)
    for code in range(last + 1):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        numbers[code] = 2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction)
    return numbers


def nearest_codes(values: NDArray[np.float32], format: Fp8Format) -> NDArray[np.uint8]:
    """Search all codes for the nearest; of two equally near, the even one."""
    numbers = all_codes(format)
    distance = np.abs(np.abs(values.astype(np.float64))[..., None] - numbers)
    distance = np.where(np.isnan(distance), np.inf, distance)
    order = np.array([2 * code + code % 2 * 1000 for code in range(128)])  # even codes first
    best = distance.min(-1, keepdims=True)
    codes = np.where(distance == best, order, 10**6).argmin(-1)
    return (codes + 128 * np.signbit(values)).astype(np.uint8)


def brute_force(
    x: NDArray[np.float32], block: tuple[int, int], format: Fp8Format, power_of_two: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantise block by block, number by number."""
    rows, columns = x.shape
    data = np.zeros(x.shape, np.uint8)
    scale_inv = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            amax = np.abs(x[at]).max()
            scale = np.float32(format.largest) / amax if amax else np.float32(1)
            if power_of_two:
                scale = np.float32(2.0 ** math.floor(math.log2(scale)))
            data[at] = nearest_codes(x[at] * scale, format)
            scale_inv[i, j] = np.float32(1) / scale
    return data, scale_inv


def matrix(rows: int, columns: int) -> Tensor:
    """Numbers over many magnitudes, some rows and blocks of zeros, in bfloat16."""
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=random) * torch.exp2(torch.randn(rows, 1, generator=random) * 6)
    x[3] = 0
    x[:, 128:] = 0
    x[5, 130 % columns] = -300.0
    return x.bfloat16()


WAYS = {
    (1, 128): fp8.quantize_rows,
    (128, 1): fp8.quantize_columns,
    (128, 128): fp8.quantize_squares,
    None: fp8.quantize_tensor,
}


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("format", Fp8Format)
@pytest.mark.parametrize("block", WAYS)
@pytest.mark.parametrize("shape", [(128, 256), (150, 200)])
def test_quantizers_equal_a_search_through_all_codes(
    shape: tuple[int, int], block: tuple[int, int] | None, format: Fp8Format, power_of_two: bool
) -> None:
    """Fails if a block has another size or direction, a ragged edge loses its scale, or a value is not rounded to the
    nearest code."""
    x = matrix(*shape)
    found: Fp8Tensor = WAYS[block](x, format, power_of_two=power_of_two)
    data, scale_inv = brute_force(x.float().numpy(), block or shape, format, power_of_two)
    np.testing.assert_array_equal(found.scale_inv_rc.numpy(), scale_inv)
    np.testing.assert_array_equal(found.data_RC.view(torch.uint8).numpy(), data)


@pytest.mark.parametrize("block", WAYS)
def test_dequantizing_keeps_each_number_to_its_significant_bits(block: tuple[int, int] | None) -> None:
    """Fails if a number is multiplied by the scale of another block: E4M3 is within 2^-4 of a number that is no more
    than 2^14 below the largest of its block."""
    x = matrix(150, 200).float()
    back = WAYS[block](x, E4M3, power_of_two=False).dequantize()
    rows, columns = block or x.shape
    for i in range(0, 150, rows):
        for j in range(0, 200, columns):
            part, there = x[i : i + rows, j : j + columns], back[i : i + rows, j : j + columns]
            normal = part.abs() > part.abs().max() / 448 * 2**-6
            torch.testing.assert_close(there[normal], part[normal], rtol=2**-4, atol=0)


def test_a_number_that_is_none_stays_with_itself() -> None:
    """Fails if a NaN or an infinity takes the numbers around it along: a NaN does not count for the maximum, an
    infinity leaves its block with a scale of 1."""
    x = torch.tensor([[NAN, 2.0, -4.0], [INF, 2.0, -4.0]])
    found = fp8.quantize_rows(x, E4M3, power_of_two=False).dequantize()
    assert found[0].isnan().tolist() == [True, False, False]
    assert found[0, 1:].tolist() == [2.0, -4.0]
    assert found[1].tolist() == [448.0, 2.0, -4.0]
