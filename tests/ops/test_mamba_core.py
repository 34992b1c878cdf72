"""Is the fused core of the mixer convolution, scan and gated norm of their definitions, forward and backward?

The oracle is these definitions one after the other, the scan token by token, in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.model.reference.ssd import ssd_recurrence
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.gated_norm import gated_rms_norm
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes, mamba_core
from nemotron_train.ops.scan_part import conv_scan
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


# Chunks are of 8. Documents end at their edges, after one token, at both ends; the two samples differ.
ENDS = ([[0, 7, 8, 15, 20], [4]], [[3, 11, 12, 13], [7, 15]], [[], list(range(21))])


def numbered(ends: list[list[int]], seq_length: int) -> Tensor:
    number_BS = torch.zeros(len(ends), seq_length, dtype=torch.int32)
    for row, places in zip(number_BS, ends, strict=True):
        for end in places:
            row[end + 1 :] += 1
    return number_BS


def masked_core(number_BS: Tensor, sizes: MixerSizes, zxBCdt_SBf: Tensor, *weights: Tensor) -> Tensor:
    """All samples at once, as matrices of tokens by tokens with zeros between documents."""
    w = CoreWeights(*weights)
    z, xBC, dt = zxBCdt_SBf.transpose(0, 1).split([sizes.inner, sizes.conv_channels, sizes.heads], dim=-1)
    seen_BLS = (number_BS[:, :, None] == number_BS[:, None, :]).tril()
    delays = torch.arange(len(dt[0]))[:, None] - torch.arange(len(dt[0]))
    tap_BLS = (seen_BLS & (delays < sizes.conv_kernel)).to(xBC.dtype)
    weight_CLS = w.conv_CK.flip(1)[:, delays.clamp(0, sizes.conv_kernel - 1)]
    sums = torch.einsum("cls,bls,bsc->blc", weight_CLS, tap_BLS, xBC) + w.conv_bias_C
    of_groups, per_group = sizes.groups * sizes.state, sizes.heads // sizes.groups
    x, B, C = functional.silu(sums).split([sizes.inner, of_groups, of_groups], dim=-1)
    B, C = (t.unflatten(-1, (sizes.groups, -1)).repeat_interleave(per_group, dim=2) for t in (B, C))
    x, dt = x.unflatten(-1, (sizes.heads, -1)), functional.softplus(dt + w.dt_bias_H)
    cumulative = (dt * w.A_H).cumsum(1)
    log_decay = (cumulative[:, :, None] - cumulative[:, None]).masked_fill(~seen_BLS[..., None], -torch.inf)
    mixing_BLSH = torch.einsum("blhn,bshn->blsh", C, B) * log_decay.exp() * dt[:, None]
    y = torch.einsum("blsh,bshp->blhp", mixing_BLSH, x) + w.D_H[:, None] * x
    return plain_gated_norm(y.flatten(-2), z, w.norm_I, sizes.groups, sizes.epsilon).transpose(0, 1)


@pytest.mark.parametrize("ends", ENDS)
def test_core_of_documents_equals_masked_matrices(ends: list[list[int]]) -> None:
    """Fails if convolution or scan reach over an end, or start anew where there is none."""
    sizes = sizes_with(groups=2)
    inputs, number_BS = random_core_inputs(sizes, 21), numbered(ends, 21)
    fused = gradients_of(lambda t, *w: mamba_core(t, CoreWeights(*w), sizes, Documents(number_BS)), inputs)
    expected = gradients_of(lambda *t: masked_core(number_BS, sizes, *t), inputs)
    for name, ours, masked in zip(NAMES, fused, expected, strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("decay", [1.0, 1e4])
def test_no_gradient_crosses_an_end(decay: float) -> None:
    """Fails if a document gets the smallest gradient from another, or NaN where decays underflow."""
    sizes = sizes_with(groups=2)
    zxBCdt, *weights = random_core_inputs(sizes, 21)
    weights[3] = decay * weights[3]
    zxBCdt.requires_grad_()
    number_BS = numbered(ENDS[1], 21)
    y_SBI = mamba_core(zxBCdt, CoreWeights(*weights), sizes, Documents(number_BS))
    for number in range(5):
        own_SB = (number_BS == number).t()
        [gradient] = torch.autograd.grad(y_SBI[own_SB].square().sum(), zxBCdt, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient[~own_SB] == 0).all()
        assert (gradient[own_SB].abs().sum(-1) > 0).all()
    [across] = torch.autograd.grad(mamba_core(zxBCdt, CoreWeights(*weights), sizes)[20:].square().sum(), zxBCdt)
    assert (across[17:20].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ends", [None, ENDS[0]])
def test_the_core_in_two_parts_is_the_core(groups: int, ends: list[list[int]] | None) -> None:
    """Fails if convolution and scan without the norm, which ranks with a share of the heads run, are not the core's."""
    sizes = sizes_with(groups)
    documents = None if ends is None else Documents(numbered(ends, 21))

    def in_two_parts(zxBCdt_SBf: Tensor, *weights: Tensor) -> Tensor:
        z, xBCdt = zxBCdt_SBf.split([sizes.inner, sizes.conv_channels + sizes.heads], dim=-1)
        y = conv_scan(xBCdt, CoreWeights(*weights), sizes, documents)
        return gated_rms_norm(y, z, weights[-1], num_groups=groups, epsilon=sizes.epsilon)

    inputs = random_core_inputs(sizes, 21)
    fused = gradients_of(lambda t, *w: mamba_core(t, CoreWeights(*w), sizes, documents), inputs)
    for name, ours, whole in zip(NAMES, gradients_of(in_two_parts, inputs), fused, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_the_scan_without_the_norm_is_rounded_once_at_its_end() -> None:
    """Fails if anything inside is bfloat16."""
    sizes = sizes_with(groups=2)
    zxBCdt, *weights = (t.bfloat16() for t in random_core_inputs(sizes, 21))
    xBCdt = zxBCdt[..., sizes.inner :]
    in_float32 = conv_scan(xBCdt.float(), CoreWeights(*(w.float() for w in weights)), sizes)
    assert torch.equal(conv_scan(xBCdt, CoreWeights(*weights), sizes), in_float32.bfloat16())
