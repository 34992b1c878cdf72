"""Are the emulation's scales and bytes those of Transformer Engine's quantizers, and its products those of its layers?

One process, no kernel that tunes itself: some seconds on a GPU.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_train.ops.rms_norm import rms_norm
from nemotron_train.precision import fp8_reference as fp8
from nemotron_train.precision.delayed_scaling import AmaxHistory, DelayedScales, advance_together
from nemotron_train.precision.emulation import DelayedQuantizers, Emulation, fp8_linear
from nemotron_train.precision.fp8_reference import Fp8Format, Fp8Tensor
from nemotron_train.precision.recipe import Fp8Recipe, Scaling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPES = [(256, 384), (144, 208)]  # whole blocks, ragged ones
DTYPES = [torch.bfloat16, torch.float32]
RECIPES = [
    Fp8Recipe(Scaling.block, wide_gradients=False, power_of_two=True),
    Fp8Recipe(Scaling.block, wide_gradients=False, power_of_two=False),
    Fp8Recipe(Scaling.current, wide_gradients=True, power_of_two=False),
    Fp8Recipe(Scaling.current, wide_gradients=True, power_of_two=True),
    Fp8Recipe(Scaling.delayed, wide_gradients=True, power_of_two=False),
]


@pytest.fixture(scope="module")
def te() -> Any:
    """Transformer Engine, with its quantizers beside it."""
    import transformer_engine.pytorch as library  # takes seconds, and is not there without a GPU
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor

    from nemotron_train.precision.te_recipe import te_recipe

    return SimpleNamespace(
        Linear=library.Linear,
        LayerNormLinear=library.LayerNormLinear,
        autocast=library.autocast,
        BlockQuantizer=float8_blockwise_tensor.Float8BlockQuantizer,
        CurrentQuantizer=float8_tensor.Float8CurrentScalingQuantizer,
        DelayedQuantizer=float8_tensor.Float8Quantizer,
        update_scales=tex.fused_amax_and_scale_update_after_reduction,
        formats={Fp8Format.e4m3: tex.DType.kFloat8E4M3, Fp8Format.e5m2: tex.DType.kFloat8E5M2},
        recipe=te_recipe,
    )


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Numbers over many magnitudes, with rows and whole blocks of zeros, and rows too small for a scale."""
    random = torch.Generator().manual_seed(shape[0])
    x = torch.randn(shape, generator=random) * torch.exp2(torch.randn(shape[0], 1, generator=random) * 6)
    x[3] = 0
    x[:128, 128:256] = 0
    x[7] = 1e-37
    return x.to(dtype).cuda()


def assert_same_bytes(ours: Fp8Tensor, data: Tensor, scale_inv: Tensor) -> None:
    torch.testing.assert_close(ours.scale_inv_rc, scale_inv, rtol=0, atol=0)
    torch.testing.assert_close(ours.data_RC.view(torch.uint8), data, rtol=0, atol=0)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("format", Fp8Format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_columns_of_128(
    te: Any, shape: tuple[int, int], dtype: torch.dtype, format: Fp8Format, power_of_two: bool
) -> None:
    """Fails if a scale or a byte of either direction of 1x128 blocks is another."""
    x = matrix(shape, dtype)
    made = te.BlockQuantizer(
        te.formats[format], rowwise=True, columnwise=True, force_pow_2_scales=power_of_two, block_scaling_dim=1
    )(x)
    rows, columns = shape
    # Scales are stored as the products want them: transposed for rows, and filled up to a multiple of 4.
    by_row = fp8.quantize_rows(x, format, power_of_two=power_of_two)
    assert_same_bytes(by_row, made._rowwise_data, made._rowwise_scale_inv[:, :rows].mT)
    by_column = fp8.quantize_columns(x, format, power_of_two=power_of_two)
    assert_same_bytes(by_column, made._columnwise_data.mT, made._columnwise_scale_inv[:, :columns])


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_of_128(te: Any, shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> None:
    """Fails if a scale or a byte of a 128x128 block is another, or its transposed copy is not the same numbers."""
    x = matrix(shape, dtype)
    made = te.BlockQuantizer(
        te.formats[Fp8Format.e4m3],
        rowwise=True,
        columnwise=True,
        force_pow_2_scales=power_of_two,
        block_scaling_dim=2,
    )(x)
    ours = fp8.quantize_squares(x, Fp8Format.e4m3, power_of_two=power_of_two)
    down, across = ours.scale_inv_rc.shape
    assert_same_bytes(ours, made._rowwise_data, made._rowwise_scale_inv[:, :across])
    assert_same_bytes(ours, made._columnwise_data.mT, made._columnwise_scale_inv[:, :down].mT)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("format", Fp8Format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_tensors(
    te: Any, shape: tuple[int, int], dtype: torch.dtype, format: Fp8Format, power_of_two: bool
) -> None:
    """Fails if a tensor's own scale, or a byte under it or under a given scale, is another."""
    x = matrix(shape, dtype)
    made = te.CurrentQuantizer(te.formats[format], device=x.device, force_pow_2_scales=power_of_two)(x)
    ours = fp8.quantize_tensor(x, format, power_of_two=power_of_two)
    assert_same_bytes(ours, made._data, made._scale_inv.view(1, 1))
    scale, amax = torch.tensor([5.0], device=x.device), torch.zeros(1, device=x.device)
    made = te.DelayedQuantizer(scale, amax, te.formats[format])(x)  # the larger numbers saturate
    assert_same_bytes(fp8.quantize_with_scale(x, scale, format), made._data, made._scale_inv.view(1, 1))
    assert amax.item() == fp8.largest_magnitude(x).item()


def test_zeros_and_infinities(te: Any) -> None:
    """Fails if a tensor without a usable maximum gets another scale, or an infinity does not saturate."""
    for value in (0.0, float("inf")):
        x = torch.full((128, 128), value, dtype=torch.bfloat16, device="cuda")
        made = te.CurrentQuantizer(te.formats[Fp8Format.e4m3], device=x.device)(x)
        ours = fp8.quantize_tensor(x, Fp8Format.e4m3, power_of_two=False)
        assert_same_bytes(ours, made._data, made._scale_inv.view(1, 1))


def test_histories_of_delayed_scaling(te: Any) -> None:
    """Fails if a maximum enters or leaves the history at another use, or a scale follows from it differently."""
    ours = AmaxHistory(3, Fp8Format.e4m3)
    history, scale = ours.amax_LQ.cuda(), ours.scale_Q.cuda()
    maxima = [[1.0, 0.0, 3.0], [5.0, 0.0, 0.0], [2.0, 7.0, float("inf")], [1e-40, 1.0, 1.0], [4.0, 1e-40, 2.0]]
    for amax in maxima * 210:  # longer than the history
        for slot, value in enumerate(amax):
            ours.note(slot, torch.tensor(value))
        advance_together([ours], None)
        history[0] = torch.tensor(amax)
        te.update_scales(history[0].clone(), [history], [scale], "max", te.formats[Fp8Format.e4m3], 0)
    torch.testing.assert_close(ours.scale_Q, scale.cpu(), rtol=0, atol=0)
    torch.testing.assert_close(ours.amax_LQ, history.cpu(), rtol=0, atol=0)


def te_steps(te: Any, recipe: Fp8Recipe, layer: Any, steps: list[list[Tensor]]) -> list[Tensor]:
    """Two micro-batches a step through a layer of Transformer Engine; returns outputs and input gradients."""
    results = []
    for number, (x, dy) in enumerate(steps):
        x = x.cuda().requires_grad_()
        with te.autocast(enabled=True, recipe=te.recipe(recipe)):
            y = layer(x, is_first_microbatch=number % 2 == 0)
        y.backward(dy.cuda())
        results += [y.detach().cpu(), x.grad.cpu()]
    return [*results, layer.weight.grad.cpu()]


def our_steps(recipe: Fp8Recipe, weight: Tensor, steps: list[list[Tensor]]) -> tuple[list[Tensor], Any]:
    emulation = Emulation(recipe)
    quantizers = emulation.new_quantizers()
    weight = weight.detach().cpu().requires_grad_()
    results = []
    for number, (x, dy) in enumerate(steps):
        x = x.clone().requires_grad_()
        with emulation.enter(None):
            y = fp8_linear(x, weight, quantizers, emulation, fresh=number % 2 == 0)
        y.backward(dy)
        results += [y.detach(), x.grad]
    return [*results, weight.grad], quantizers


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.scaling.value}-{recipe.power_of_two}")
def test_products_of_a_layer(te: Any, recipe: Fp8Recipe) -> None:
    """Fails if a product has other operands than the layer's: results differ by sums in another order, on Hopper with
    fewer bits in some products, and by a rounding to bfloat16."""
    random = torch.Generator().manual_seed(0)
    steps = [
        [torch.randn(2, 128, size, generator=random).bfloat16() * 2.0**number for size in (256, 384)]
        for number in range(4)
    ]
    layer = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16, device="cuda")
    theirs = te_steps(te, recipe, layer, steps)
    ours, quantizers = our_steps(recipe, layer.weight, steps)
    for found, wanted in zip(ours, theirs, strict=True):
        assert float((found.float() - wanted.float()).norm() / wanted.float().norm()) < 1e-2  # another operand: 3e-2
    if not isinstance(quantizers, DelayedQuantizers):
        return
    # The state of both is the same, and each reads the other's.
    theirs_read = DelayedScales(Fp8Format.e5m2)
    theirs_read.from_bytes(layer.get_extra_state().cpu())
    other = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16, device="cuda")
    other.set_extra_state(quantizers.scales.to_bytes())
    for direction, key in (("forward", "scaling_fwd"), ("backward", "scaling_bwd")):
        mine, read = getattr(quantizers.scales, direction), getattr(theirs_read, direction)
        torch.testing.assert_close(read.scale_Q, mine.scale_Q, rtol=0, atol=0)
        torch.testing.assert_close(read.amax_LQ, mine.amax_LQ, rtol=0, atol=0)
        torch.testing.assert_close(other.fp8_meta[key].scale.cpu(), mine.scale_Q, rtol=0, atol=0)


def test_delayed_scaling_quantises_a_norm_before_it_is_rounded(te: Any) -> None:
    """Fails if the norm's kernel notes the maximum of its rounded results, which would be quantised twice."""
    layer = te.LayerNormLinear(
        256, 384, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16, device="cuda"
    )
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with te.autocast(enabled=True, recipe=te.recipe(RECIPES[-1])):
        layer(x.cuda())
    noted = layer.fp8_meta["scaling_fwd"].amax_history[-1, 0].cpu()
    wanted = rms_norm(x.float(), torch.ones(256), epsilon=1e-5).abs().max()
    torch.testing.assert_close(noted, wanted, rtol=1e-6, atol=0)
    assert noted != noted.bfloat16().float()
