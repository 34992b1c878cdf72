"""Are the hand-written convolution, gated norm and squared ReLU what their definitions say, forward and backward?

The oracles are the same definitions out of torch's own functions, in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.errors import ConfigError
from nemotron_train.ops import causal_conv, gated_norm
from nemotron_train.ops.causal_conv import causal_conv_silu
from nemotron_train.ops.gated_norm import gated_rms_norm
from nemotron_train.ops.implementations import operations
from nemotron_train.ops.squared_relu import squared_relu
from tests.ops.scan_inputs import gradients_of


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kernel = weight.shape[1]
    out = functional.conv1d(x.mT, weight[:, None], bias, padding=kernel - 1, groups=len(weight))
    return functional.silu(out[..., : x.shape[1]].mT)


def plain_gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    gated = (y * functional.silu(z)).unflatten(-1, (groups, -1))
    return functional.rms_norm(gated, gated.shape[-1:], eps=epsilon).flatten(-2) * weight


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert (a.double() - b).norm() <= tolerance * b.norm(), f"output or gradient {index}"


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("seq_length", [1, 3, 4, 50])
@pytest.mark.parametrize("block_tokens", [1, 2, 7, 64])
def test_convolution(kernel: int, seq_length: int, block_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a weight meets the wrong token, at the start of the sequence or at the border of two blocks."""
    monkeypatch.setattr(causal_conv, "_BLOCK_NUMBERS", block_tokens * 2 * 6)
    inputs = [random(2, seq_length, 6), random(6, kernel, seed=1), random(6, seed=2)]
    assert_same(gradients_of(causal_conv_silu, inputs), gradients_of(plain_conv, inputs))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("block_tokens", [1, 4, 1000])
def test_gated_norm(groups: int, block_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the norm comes before the gate, if groups mix, or if a block of tokens is left out."""
    monkeypatch.setattr(gated_norm, "_BLOCK_NUMBERS", block_tokens * 12)
    inputs = [random(3, 5, 12), random(3, 5, 12, seed=1), random(12, seed=2)]
    ours = gradients_of(lambda *t: gated_rms_norm(*t, num_groups=groups, epsilon=0.1), inputs)
    assert_same(ours, gradients_of(lambda *t: plain_gated_norm(*t, groups, 0.1), inputs))


def test_gated_norm_of_zeros_has_finite_gradients() -> None:
    """Fails if the backward divides by the norm without epsilon."""
    inputs = [torch.zeros(1, 2, 4), random(1, 2, 4, dtype=torch.float32), torch.ones(4)]
    assert all(
        t.isfinite().all() for t in gradients_of(lambda *t: gated_rms_norm(*t, num_groups=2, epsilon=1e-5), inputs)
    )


def test_squared_relu() -> None:
    """Fails if negative numbers pass, or if the gradient lacks its factor 2."""
    inputs = [random(4, 9)]
    assert_same(gradients_of(squared_relu, inputs), gradients_of(lambda x: functional.relu(x) ** 2, inputs))


def test_bfloat16_is_rounded_once() -> None:
    """Fails if bfloat16 is used inside: results are within a unit in the last place (2^-7) of float64's."""
    conv = [random(2, 40, 6), random(6, 4, seed=1), random(6, seed=2)]
    norm = [random(3, 5, 12), random(3, 5, 12, seed=1), random(12, seed=2)]
    for ours, plain, inputs in (
        (causal_conv_silu, plain_conv, conv),
        (
            lambda *t: gated_rms_norm(*t, num_groups=3, epsilon=1e-5),
            lambda *t: plain_gated_norm(*t, 3, 1e-5),
            norm,
        ),
    ):
        rounded = [t.bfloat16() for t in inputs]
        results = gradients_of(ours, rounded)
        assert all(t.dtype == torch.bfloat16 for t in results)
        assert_same(results, gradients_of(plain, [t.double() for t in rounded]), tolerance=2**-7)


def test_views_of_wider_tensors_are_read_in_order() -> None:
    """Fails if the columns of a projection, or (sequence, micro-batch) memory, are taken for contiguous memory."""
    wide_SBC = random(50, 2, 20)
    x, z = (t.transpose(0, 1) for t in wide_SBC.split([8, 12], dim=-1))
    weight, bias, norm_weight = random(8, 4, seed=1), random(8, seed=2), random(12, seed=3)
    y = random(2, 50, 12, seed=4)
    assert torch.equal(causal_conv_silu(x, weight, bias), causal_conv_silu(x.contiguous(), weight, bias))
    ours, expected = (gated_rms_norm(y, t, norm_weight, num_groups=2, epsilon=1e-5) for t in (z, z.contiguous()))
    assert torch.equal(ours, expected)


def test_an_unknown_implementation_is_refused_with_the_known_names() -> None:
    """Fails if a typing error falls back to another implementation."""
    with pytest.raises(ConfigError, match=r"'troch'.*torch"):
        operations("troch")
