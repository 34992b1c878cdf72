"""Are our Triton kernels the operations of `mamba_core`, forward and backward?

On the CPU they run in Triton's interpreter (tests/conftest.py), in float32; with a GPU the whole core runs on it.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")

from nemotron_train.ops import mamba_core as torch_core
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes
from nemotron_train.ops.ssd import ssd
from nemotron_train.ops.triton_gated_norm import gated_norm, gated_norm_gradients
from nemotron_train.ops.triton_ssd import scan, scan_gradients, step_sizes, supports
from tests.ops.test_elementwise_operations import plain_gated_norm, random

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the whole core runs instead")


def random_weights(sizes: MixerSizes) -> CoreWeights:
    return CoreWeights(
        conv_CK=random(sizes.conv_channels, sizes.conv_kernel, seed=1),
        conv_bias_C=random(sizes.conv_channels, seed=2),
        dt_bias_H=random(sizes.heads, seed=3),
        A_H=-random(sizes.heads, seed=4).exp(),
        D_H=random(sizes.heads, seed=5),
        norm_I=random(sizes.inner, seed=6),
    )


@on_cpu
@pytest.mark.parametrize(
    ("groups", "heads", "head_dim", "seq_length", "chunk"),
    [(1, 2, 16, 16, 16), (2, 4, 20, 41, 16), (1, 3, 5, 50, 16), (1, 2, 16, 200, 128)],
)
def test_scan_and_its_gradients_equal_those_of_plain_torch(
    groups: int, heads: int, head_dim: int, seq_length: int, chunk: int
) -> None:
    """Fails if a tile's bounds, the decay between two tokens, or a path of a gradient is wrong."""
    sizes = MixerSizes(heads, head_dim, groups, state=16, conv_kernel=4, chunk=chunk, epsilon=0.1)
    weights = random_weights(sizes)
    xBC, raw, dy = (random(seq_length, 2, n, seed=n) for n in (sizes.conv_channels, heads, sizes.inner))

    leaves = [t.clone().requires_grad_() for t in (xBC, raw, weights.dt_bias_H, weights.A_H, weights.D_H)]
    x, B, C = leaves[0].split([sizes.inner, groups * 16, groups * 16], dim=-1)
    B, C = (t.unflatten(-1, (groups, 16)).transpose(0, 1) for t in (B, C))
    dt = torch.nn.functional.softplus(leaves[1] + leaves[2]).transpose(0, 1)
    expected = ssd(x.unflatten(-1, (heads, -1)).transpose(0, 1), dt, leaves[3], B, C, leaves[4], chunk_size=chunk)
    expected = expected.flatten(2).transpose(0, 1)
    expected_gradients = torch.autograd.grad(expected, leaves, dy)

    weights = CoreWeights(*(w.float() for w in weights))
    xBC, raw, dy = xBC.float(), raw.float(), dy.float()
    steps = step_sizes(raw, weights, sizes.chunk)
    y, kept = scan(xBC, steps, weights.D_H, sizes)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    d_raw = torch.empty_like(raw)
    d_xBC, d_weights = scan_gradients(dy, xBC, raw, kept, weights, sizes, d_raw_dt=d_raw)
    for name, found, right in zip(
        ("xBC", "raw dt", "bias of dt", "A", "D"), (d_xBC, d_raw, *d_weights), expected_gradients, strict=True
    ):
        difference = (found.double() - right).norm() / right.norm()
        assert difference < 3e-5, f"{name}: {difference}"


@on_cpu
def test_gated_norm_and_its_gradients_equal_the_definition() -> None:
    """Fails if a group takes another's mean square, or z is read as if its rows were not part of wider ones."""
    rows, inner, groups = 7, 24, 2
    wide, y, weight, dout = (
        random(*shape, seed=s) for s, shape in enumerate(((rows, 40), (rows, inner), (inner,), (rows, inner)))
    )
    leaves = [t.clone().requires_grad_() for t in (y, wide[:, :inner], weight)]
    expected = plain_gated_norm(*leaves, groups, 0.1)
    expected_gradients = torch.autograd.grad(expected, leaves, dout)

    y, wide, weight, dout = (t.float() for t in (y, wide, weight, dout))
    out, scale = gated_norm(y, wide[:, :inner], weight, groups, 0.1)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    d_wide = torch.full_like(wide, 5.0)
    dy, d_weight = gated_norm_gradients(dout, y, wide[:, :inner], weight, scale, d_wide[:, :inner])
    for found, right in zip((dy, d_wide[:, :inner], d_weight), expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)
    assert (d_wide[:, inner:] == 5.0).all()


def test_sizes_without_tiles_are_known() -> None:
    """Fails if a size that the kernels would compute wrongly reaches them."""
    fits = MixerSizes(4, 80, 1, state=128, conv_kernel=4, chunk=128, epsilon=0.1)
    assert supports(fits)
    for change in ({"chunk": 256}, {"state": 48}, {"head_dim": 130}):
        assert not supports(MixerSizes(**{**vars(fits), **change}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("groups", "heads", "head_dim", "batch", "seq_length"),
    [(1, 8, 64, 2, 300), (1, 4, 64, 2, 300), (2, 32, 80, 1, 1024), (8, 128, 80, 1, 512)],
)
def test_the_whole_core_on_a_gpu(groups: int, heads: int, head_dim: int, batch: int, seq_length: int) -> None:
    """Fails if the kernels, compiled, differ from plain torch in float64 by more than bf16 does, ours differ from their
    first results, or a projection ends the run whose width (772, of 4 heads) the convolution does not take."""
    from nemotron_train.ops.triton_core import mamba_core

    sizes = MixerSizes(heads, head_dim, groups, state=128, conv_kernel=4, chunk=128, epsilon=1e-5)
    weights = random_weights(sizes)
    weights = weights._replace(dt_bias_H=weights.dt_bias_H - 3.0)
    projected = random(seq_length, batch, sizes.inner + sizes.conv_channels + heads, seed=8)
    dout = random(seq_length, batch, sizes.inner, seed=9).cuda()
    kept_in_float32 = {"dt_bias_H", "A_H", "D_H"}

    def run(core, dtype: torch.dtype, weight_dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [projected.bfloat16().to("cuda", dtype).requires_grad_()]
        for name, weight in weights._asdict().items():
            rounded = weight.float() if name in kept_in_float32 else weight.bfloat16()
            leaves.append(rounded.to("cuda", weight_dtype if name in kept_in_float32 else dtype).requires_grad_())
        out = core(leaves[0], CoreWeights(*leaves[1:]), sizes)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    expected = run(torch_core.mamba_core, torch.float64, torch.float64)
    found = run(mamba_core, torch.bfloat16, torch.float32)
    again = run(mamba_core, torch.bfloat16, torch.float32)
    by_published_kernels = projected.shape[-1] % 8 != 0  # which add up atomically, as their convolution always does
    for name, right, ours, second in zip(
        ("out", "d_zxBCdt", *CoreWeights._fields), expected, found, again, strict=True
    ):
        difference = (ours.double() - right).norm() / right.norm()
        assert difference < 0.015, f"{name}: {difference}"
        assert torch.equal(ours, second) or by_published_kernels or name.startswith("conv"), name
