"""Is the fused core of the mixer convolution, scan and gated norm of their definitions, forward and backward?

The oracle is these definitions one after the other, the scan token by token, in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.model.reference.ssd import ssd_recurrence
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes, mamba_core
from tests.ops.scan_inputs import gradients_of
from tests.ops.test_elementwise_operations import plain_conv, plain_gated_norm, random

NAMES = ("y", "d_zxBCdt", *(f"d_{name}" for name in CoreWeights._fields))


def sizes_with(groups: int, chunk: int = 8) -> MixerSizes:
    return MixerSizes(heads=4, head_dim=5, groups=groups, state=3, conv_kernel=4, chunk=chunk, epsilon=0.1)


def random_core_inputs(sizes: MixerSizes, seq_length: int) -> list[Tensor]:
    heads, channels = sizes.heads, sizes.conv_channels
    return [
        random(seq_length, 2, sizes.inner + channels + heads),
        random(channels, sizes.conv_kernel, seed=1),
        random(channels, seed=2),
        random(heads, seed=3),
        -random(heads, seed=4).exp(),
        random(heads, seed=5),
        random(sizes.inner, seed=6),
    ]


def plain_core(sizes: MixerSizes, zxBCdt_SBf: Tensor, *weights: Tensor) -> Tensor:
    w = CoreWeights(*weights)
    z, xBC, dt = zxBCdt_SBf.transpose(0, 1).split([sizes.inner, sizes.conv_channels, sizes.heads], dim=-1)
    of_groups = sizes.groups * sizes.state
    x, B, C = plain_conv(xBC, w.conv_CK, w.conv_bias_C).split([sizes.inner, of_groups, of_groups], dim=-1)
    y = ssd_recurrence(
        x.unflatten(-1, (sizes.heads, -1)),
        functional.softplus(dt + w.dt_bias_H),
        w.A_H,
        B.unflatten(-1, (sizes.groups, -1)),
        C.unflatten(-1, (sizes.groups, -1)),
        w.D_H,
    )
    return plain_gated_norm(y.flatten(-2), z, w.norm_I, sizes.groups, sizes.epsilon).transpose(0, 1)


def fused_core(sizes: MixerSizes, zxBCdt_SBf: Tensor, *weights: Tensor) -> Tensor:
    return mamba_core(zxBCdt_SBf, CoreWeights(*weights), sizes)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seq_length", [1, 2, 8, 16, 21])
def test_output_and_gradients_equal_the_definitions(groups: int, seq_length: int) -> None:
    """Fails if a part of the projection or its gradient stands in the wrong place, or a weight's gradient is wrong."""
    sizes = sizes_with(groups)
    inputs = random_core_inputs(sizes, seq_length)
    fused = gradients_of(lambda *t: fused_core(sizes, *t), inputs)
    expected = gradients_of(lambda *t: plain_core(sizes, *t), inputs)
    for name, ours, plain in zip(NAMES, fused, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    """Fails if anything between the projections is bfloat16: all is within half a last place (2^-8) of float32."""
    sizes = sizes_with(groups=2)
    inputs = [t.bfloat16() for t in random_core_inputs(sizes, 21)]
    fused = gradients_of(lambda *t: fused_core(sizes, *t), inputs)
    expected = gradients_of(lambda *t: plain_core(sizes, *t), [t.double() for t in inputs])
    for name, ours, plain in zip(NAMES, fused, expected, strict=True):
        assert ours.dtype == torch.bfloat16, name
        assert (ours.double() - plain).norm() <= 2**-8 * plain.norm(), name


def test_a_second_run_gives_the_same_bits() -> None:
    """Fails if memory that a chunk uses again is read before it is written."""
    sizes = sizes_with(groups=2)
    inputs = [t.float() for t in random_core_inputs(sizes, 21)]
    first = gradients_of(lambda *t: fused_core(sizes, *t), inputs)
    torch.full((1 << 16,), torch.nan)  # what the next allocations may find
    for ours, again in zip(first, gradients_of(lambda *t: fused_core(sizes, *t), inputs), strict=True):
        assert torch.equal(ours, again)
