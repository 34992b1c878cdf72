"""Do emulated products multiply what the recipes say? The oracle multiplies the quantised operands in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemotron_train.precision import fp8_reference as fp8
from nemotron_train.precision.emulation import DelayedQuantizers, Emulation, Quantizers, fp8_linear
from nemotron_train.precision.fp8_reference import Fp8Format, Fp8Tensor
from nemotron_train.precision.recipe import Fp8Recipe, Scaling
from tests.precision.states import same

BLOCK = Fp8Recipe(Scaling.block, wide_gradients=False, power_of_two=True)
CURRENT = Fp8Recipe(Scaling.current, wide_gradients=True, power_of_two=False)
DELAYED = Fp8Recipe(Scaling.delayed, wide_gradients=True, power_of_two=False)
E4M3, E5M2 = Fp8Format.e4m3, Fp8Format.e5m2

Quantize = Callable[..., Fp8Tensor]


def operands(seed: int = 0) -> list[Tensor]:
    """x [2, 80, K], weight [N, K] and dy [2, 80, N], with magnitudes that differ from token to token and from channel
    to channel."""
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        spread = torch.randn(shape, generator=random) * 2 + torch.randn(shape[-1], generator=random) * 3
        return (torch.randn(shape, generator=random) * spread.exp2()).bfloat16()

    return [numbers(2, 80, 144), numbers(160, 144), numbers(2, 80, 160)]


def run_linear(
    x: Tensor, weight: Tensor, dy: Tensor, quantizers: Quantizers, emulation: Emulation, fresh: bool = True
) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with emulation.enter(None):
        y = fp8_linear(x, weight, quantizers, emulation, fresh=fresh)
    y.backward(dy)
    return [y.detach(), x.grad, weight.grad]


def by_hand(x: Tensor, weight: Tensor, dy: Tensor, quantize: dict[str, Callable[[Tensor], Fp8Tensor]]) -> list[Tensor]:
    def numbers(name: str, matrix: Tensor) -> Tensor:
        return quantize[name](matrix.flatten(0, -2)).dequantize().double()

    y = numbers("x", x) @ numbers("weight", weight).T
    dx = numbers("dy", dy) @ numbers("weight", weight)
    dweight = numbers("dy for dweight", dy).T @ numbers("x for dweight", x)
    return [y.view(dy.shape), dx.view(x.shape), dweight]


def with_format(quantize: Quantize, format: Fp8Format, power_of_two: bool) -> Callable[[Tensor], Fp8Tensor]:
    return lambda matrix: quantize(matrix, format, power_of_two=power_of_two)


EXPECTED = {
    BLOCK: {
        "x": with_format(fp8.quantize_rows, E4M3, True),
        "weight": with_format(fp8.quantize_squares, E4M3, True),
        "dy": with_format(fp8.quantize_rows, E4M3, True),
        "x for dweight": with_format(fp8.quantize_columns, E4M3, True),
        "dy for dweight": with_format(fp8.quantize_columns, E4M3, True),
    },
    CURRENT: {
        "x": with_format(fp8.quantize_tensor, E4M3, False),
        "weight": with_format(fp8.quantize_tensor, E4M3, False),
        "dy": with_format(fp8.quantize_tensor, E5M2, False),
        "x for dweight": with_format(fp8.quantize_tensor, E4M3, False),
        "dy for dweight": with_format(fp8.quantize_tensor, E5M2, False),
    },
}


def assert_rounded(found: list[Tensor], exact: list[Tensor]) -> None:
    """Sums in float32 of up to 160 products, then rounded to bfloat16."""
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        size = wanted.abs().mean()
        torch.testing.assert_close(ours.double(), wanted, rtol=2**-8, atol=1e-5 * float(size))


@pytest.mark.parametrize("recipe", EXPECTED, ids=lambda recipe: recipe.scaling.value)
def test_the_three_products_have_the_operands_of_the_table(recipe: Fp8Recipe) -> None:
    """Fails if an operand is quantised along the wrong dimension, in the other format, or not at all."""
    emulation = Emulation(recipe)
    found = run_linear(*operands(), emulation.new_quantizers(), emulation)
    assert_rounded(found, by_hand(*operands(), EXPECTED[recipe]))


@pytest.mark.parametrize("recipe", [BLOCK, CURRENT])
def test_a_bias_is_added_before_rounding_and_has_its_gradient(recipe: Fp8Recipe) -> None:
    """Fails if a bias is dropped in FP8, is quantised, or gets no gradient: the sum of the output's over tokens."""
    x, weight, dy = operands()
    bias = (100 * torch.randn(160, generator=torch.Generator().manual_seed(1))).bfloat16().requires_grad_()
    emulation = Emulation(recipe)
    with emulation.enter(None):
        without = fp8_linear(x.float(), weight.float(), emulation.new_quantizers(), emulation, fresh=True)
        y = fp8_linear(x, weight, emulation.new_quantizers(), emulation, fresh=True, bias_N=bias)
    torch.testing.assert_close(y, (without + bias).bfloat16(), rtol=0, atol=0)
    y.backward(dy)
    torch.testing.assert_close(bias.grad.double(), dy.double().sum((0, 1)), rtol=2**-7, atol=1e-2)


def test_delayed_scaling_multiplies_with_the_scales_of_the_use_before() -> None:
    """Fails if scales are those of the tensor at hand, a weight's maximum counts once a micro-batch instead of once a
    step, or the backward pass does not advance."""
    emulation = Emulation(DELAYED)
    quantizers = emulation.new_quantizers()
    assert isinstance(quantizers, DelayedQuantizers)
    scales = {"x": 1.0, "weight": 1.0, "dy": 1.0}
    largest = dict.fromkeys(scales, 0.0)
    for micro_batch in range(4):
        fresh = micro_batch % 2 == 0  # two micro-batches a step
        x, weight, dy = operands(micro_batch)
        weight = operands(micro_batch // 2)[1]
        if fresh:
            weight_scale = scales["weight"]
        given = {
            "x": (scales["x"], E4M3),
            "weight": (weight_scale, E4M3),
            "dy": (scales["dy"], E5M2),
            "x for dweight": (scales["x"], E4M3),
            "dy for dweight": (scales["dy"], E5M2),
        }
        quantize = {
            name: (lambda matrix, scale=scale, format=format:
                   fp8.quantize_with_scale(matrix, torch.tensor(scale), format))
            for name, (scale, format) in given.items()
        }  # fmt: skip
        found = run_linear(x, weight, dy, quantizers, emulation, fresh)
        assert_rounded(found, by_hand(x, weight, dy, quantize))
        for name, tensor, limit in (("x", x, 448), ("weight", weight, 448), ("dy", dy, 57344)):
            largest[name] = max(largest[name], float(tensor.abs().max()))
            scales[name] = float(torch.tensor(float(limit)) / torch.tensor(largest[name]))
    used = (quantizers.scales.forward.amax_LQ != 0).sum(0).tolist()
    assert used == [4, 2, 0]
    assert (quantizers.scales.backward.amax_LQ != 0).sum(0).tolist() == [4, 0]


def test_evaluation_leaves_no_trace_in_delayed_scales() -> None:
    """Fails if a run that evaluated goes on with other scales than one that did not."""
    emulation = Emulation(DELAYED)
    quantizers = emulation.new_quantizers()
    assert isinstance(quantizers, DelayedQuantizers)
    run_linear(*operands(), quantizers, emulation)
    before = copy.deepcopy(quantizers.scales)
    x, weight, _ = operands(1)
    with torch.no_grad(), emulation.enter(None):
        fp8_linear(1000 * x, weight, quantizers, emulation, fresh=True)
    assert same(quantizers.scales, before)


class TwoLayers:
    """Two linear layers, one after the other, whose weights are quantised once a step."""

    def __init__(self) -> None:
        self.emulation = Emulation(DELAYED)
        self.quantizers = [self.emulation.new_quantizers() for _ in range(2)]
        self.weights: list[Tensor] = []
        self.fresh = False

    def run(self, x: Tensor) -> Tensor:
        for weight, quantizers in zip(self.weights, self.quantizers, strict=True):
            x = fp8_linear(x, weight, quantizers, self.emulation, fresh=self.fresh)
        self.fresh = False
        return x

    def step(self, seed: int, recompute: bool) -> list[Tensor]:
        x, weight, _ = operands(seed)
        self.weights = [weight.requires_grad_(), weight.detach().mT.contiguous().requires_grad_()]
        self.fresh = True
        x.requires_grad_()
        with self.emulation.enter(None):
            run = self.emulation.to_recompute(self.run) if recompute else self.run
            y = checkpoint(run, x, use_reentrant=True) if recompute else run(x)
        y.backward(operands(9)[0])
        return [y, x.grad, *(weight.grad for weight in self.weights)]


def test_layers_computed_again_use_the_scales_of_the_first_time() -> None:
    """Fails if a checkpointed stretch is computed again with scales that have advanced since, or is quantised the
    second time only, or counts twice."""
    kept, again = TwoLayers(), TwoLayers()
    for seed in range(3):
        for wanted, found in zip(kept.step(seed, False), again.step(seed, True), strict=True):
            assert torch.equal(found, wanted)
    for wanted, found in zip(kept.quantizers, again.quantizers, strict=True):
        assert isinstance(wanted, DelayedQuantizers)
        assert isinstance(found, DelayedQuantizers)
        assert same(found.scales, wanted.scales)


def test_weight_gradients_are_added_to_the_main_gradient_unrounded() -> None:
    """Fails if a weight gradient passes through bfloat16 on its way into the float32 main gradient, or is lost."""
    emulation = Emulation(CURRENT)
    x, weight, dy = operands()
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.full(weight.shape, 0.5)
    with emulation.enter(None):
        y = fp8_linear(x, weight, emulation.new_quantizers(), emulation, fresh=True)
    y.backward(dy)
    wanted = by_hand(x, weight.detach(), dy, EXPECTED[CURRENT])[2] + 0.5
    torch.testing.assert_close(weight.main_grad.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().mean()))
    assert weight.grad_added_to_main_grad
