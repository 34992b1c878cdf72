"""FP8 products on a device without FP8: operands quantised as Transformer Engine does, multiplied in float32.

`fp8_reference.py` says what is quantised how. Here is when: what a linear layer does in its three products, and what
is kept from one micro-batch to the next. It knows no ranks but those over which delayed scaling reduces its maxima.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemotron_train.precision import fp8_reference as fp8
from nemotron_train.precision.delayed_scaling import INPUT, OUTPUT_GRADIENT, WEIGHT, DelayedScales, advance_together
from nemotron_train.precision.fp8_reference import Fp8Format, Fp8Tensor
from nemotron_train.precision.recipe import Fp8Recipe, Scaling

# Shapes: T tokens, K inputs, N outputs; [..., K] for any leading dimensions.

ForTwoProducts = tuple[Fp8Tensor, Fp8Tensor]


class Quantizers(ABC):
    """What quantises the operands of one linear layer."""

    listener: Callable[[str, Fp8Format, Fp8Format], None] | None = None  # told of every product, for tests

    def __init__(self, recipe: Fp8Recipe) -> None:
        self.gradient_format = Fp8Format.e5m2 if recipe.wide_gradients else Fp8Format.e4m3
        self.power_of_two = recipe.power_of_two
        self.kept_weight: Fp8Tensor | None = None

    @abstractmethod
    def input(self, x_TK: Tensor) -> ForTwoProducts:
        """Quantise an input for the forward product and for the weight gradient."""

    @abstractmethod
    def weight(self, weight_NK: Tensor) -> Fp8Tensor:
        """Quantise the weight, for the forward product and the data gradient."""

    @abstractmethod
    def gradient(self, dy_TN: Tensor) -> ForTwoProducts:
        """Quantise an output gradient for the data gradient and for the weight gradient."""

    def multiplied(self, product: str, first: Fp8Tensor, second: Fp8Tensor) -> None:
        if self.listener is not None:
            self.listener(product, first.format, second.format)


class BlockQuantizers(Quantizers):
    def input(self, x_TK: Tensor) -> ForTwoProducts:
        return self._both_ways(x_TK, Fp8Format.e4m3)

    def weight(self, weight_NK: Tensor) -> Fp8Tensor:
        return fp8.quantize_squares(weight_NK, Fp8Format.e4m3, power_of_two=self.power_of_two)

    def gradient(self, dy_TN: Tensor) -> ForTwoProducts:
        return self._both_ways(dy_TN, self.gradient_format)

    def _both_ways(self, x: Tensor, format: Fp8Format) -> ForTwoProducts:
        return (
            fp8.quantize_rows(x, format, power_of_two=self.power_of_two),
            fp8.quantize_columns(x, format, power_of_two=self.power_of_two),
        )


class CurrentQuantizers(Quantizers):
    def input(self, x_TK: Tensor) -> ForTwoProducts:
        return (self._whole(x_TK, Fp8Format.e4m3),) * 2

    def weight(self, weight_NK: Tensor) -> Fp8Tensor:
        return self._whole(weight_NK, Fp8Format.e4m3)

    def gradient(self, dy_TN: Tensor) -> ForTwoProducts:
        return (self._whole(dy_TN, self.gradient_format),) * 2

    def _whole(self, x: Tensor, format: Fp8Format) -> Fp8Tensor:
        return fp8.quantize_tensor(x, format, power_of_two=self.power_of_two)


class DelayedQuantizers(Quantizers):
    def __init__(self, recipe: Fp8Recipe, emulation: "Emulation") -> None:
        super().__init__(recipe)
        self.scales = DelayedScales(self.gradient_format)
        self._emulation = emulation

    def input(self, x_TK: Tensor) -> ForTwoProducts:
        region = self._emulation.region
        assert region is not None, "layers quantise only inside FP8"
        scale = self.scales.forward.scale_Q[INPUT].clone()
        if region.again is not None:
            scale = region.again.pop(0)
        elif region.trains:
            self.scales.forward.note(INPUT, fp8.largest_magnitude(x_TK))
        if region.kept is not None:
            region.kept.append(scale)
        return (fp8.quantize_with_scale(x_TK, scale, Fp8Format.e4m3),) * 2

    def weight(self, weight_NK: Tensor) -> Fp8Tensor:
        region = self._emulation.region
        if region is not None and region.trains:
            self.scales.forward.note(WEIGHT, fp8.largest_magnitude(weight_NK))
        return fp8.quantize_with_scale(weight_NK, self.scales.forward.scale_Q[WEIGHT], Fp8Format.e4m3)

    def gradient(self, dy_TN: Tensor) -> ForTwoProducts:
        self.scales.backward.note(OUTPUT_GRADIENT, fp8.largest_magnitude(dy_TN))
        scale = self.scales.backward.scale_Q[OUTPUT_GRADIENT]
        return (fp8.quantize_with_scale(dy_TN, scale, self.gradient_format),) * 2


@dataclass
class Region:
    """A stretch of the model that runs in FP8."""

    group: Any  # over which delayed scaling reduces its maxima
    trains: bool  # evaluation must leave no trace in the scales
    first: bool = True  # no product was begun yet
    kept: list[Tensor] | None = None  # scales used by layers that will be computed again
    again: list[Tensor] | None = None  # scales to use, because layers are computed again

    def take_first(self) -> bool:
        first, self.first = self.first, False
        return first


class Emulation:
    """FP8 of one model on this rank: whether it is entered, and the scales of all its layers."""

    def __init__(self, recipe: Fp8Recipe) -> None:
        self.recipe = recipe
        self.region: Region | None = None
        self._delayed: list[DelayedScales] = []

    @property
    def is_delayed(self) -> bool:
        return self.recipe.scaling is Scaling.delayed

    def new_quantizers(self) -> Quantizers:
        """Build the quantizers of one more layer."""
        if self.is_delayed:
            quantizers = DelayedQuantizers(self.recipe, self)
            self._delayed.append(quantizers.scales)
            return quantizers
        return {Scaling.block: BlockQuantizers, Scaling.current: CurrentQuantizers}[self.recipe.scaling](self.recipe)

    @contextmanager
    def enter(self, group: Any) -> Iterator[None]:
        """Let the linear layers inside run in FP8; delayed scaling advances at the end of a training forward pass."""
        region = Region(group, trains=torch.is_grad_enabled())
        with self._inside(region):
            yield
        if region.trains:
            self._advance([scales.forward for scales in self._delayed], group)

    def to_recompute(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return `run` for a checkpoint that calls it twice: the second time in FP8 again, with the scales of the
        first, although delayed scaling has advanced since."""
        outer = self.region
        if outer is None or not self.is_delayed:
            return run  # enters FP8 itself, and scales follow from the tensors
        scales: list[Tensor] = []
        calls = 0

        def run_again(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            second = calls > 1
            region = Region(
                outer.group,
                outer.trains,
                first=outer.first,
                kept=None if second else scales,
                again=list(scales) if second else None,
            )
            with self._inside(region):
                return run(x)

        return run_again

    def advance_backward(self, group: Any) -> None:
        """End of a backward pass: delayed scaling advances."""
        self._advance([scales.backward for scales in self._delayed], group)

    @contextmanager
    def _inside(self, region: Region) -> Iterator[None]:
        outer, self.region = self.region, region
        try:
            yield
        finally:
            self.region = outer

    def _advance(self, histories: list, group: Any) -> None:
        if histories:
            advance_together(histories, group)


def fp8_linear(
    x: Tensor,
    weight_NK: Tensor,
    quantizers: Quantizers,
    emulation: Emulation,
    *,
    fresh: bool,
    bias_N: Tensor | None = None,
) -> Tensor:
    """Multiply x [..., K] by the weight's transpose, in FP8 forward and backward; the bias is added before rounding.

    Args:
        fresh: the weight may have changed since the last call; else its quantised copy is used again.

    Returns:
        [..., N] in the weight's dtype, whatever x's is.
    """
    if fresh or quantizers.kept_weight is None:
        quantizers.kept_weight = quantizers.weight(weight_NK.detach())
    return _Fp8Linear.apply(x, weight_NK, bias_N, quantizers.kept_weight, quantizers, emulation)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        weight: Fp8Tensor,
        quantizers: Quantizers,
        emulation: Emulation,
    ) -> Tensor:
        assert emulation.region is not None, "layers quantise only inside FP8"
        x_forward, x_backward = quantizers.input(x.flatten(0, -2))
        quantizers.multiplied("forward", x_forward, weight)
        y_TN = x_forward.dequantize() @ weight.dequantize().mT
        if bias_N is not None:
            y_TN += bias_N
        ctx.weight_NK, ctx.weight, ctx.x, ctx.shape = weight_NK, weight, x_backward, x.shape
        ctx.quantizers, ctx.emulation, ctx.group = quantizers, emulation, emulation.region.group
        # The first layer's backward pass is the last to come.
        ctx.ends_backward = emulation.region.take_first()
        return y_TN.to(weight_NK.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        quantizers, weight_NK = ctx.quantizers, ctx.weight_NK
        dy_data, dy_weight = quantizers.gradient(dy.flatten(0, -2))
        quantizers.multiplied("data gradient", dy_data, ctx.weight)
        dx_TK = dy_data.dequantize() @ ctx.weight.dequantize()
        quantizers.multiplied("weight gradient", dy_weight, ctx.x)
        dweight_NK = dy_weight.dequantize().mT @ ctx.x.dequantize()
        if ctx.ends_backward:
            ctx.emulation.advance_backward(ctx.group)
        dbias_N = dy.flatten(0, -2).sum(0, dtype=torch.float32).to(dy.dtype) if ctx.needs_input_grad[2] else None
        dx = dx_TK.to(weight_NK.dtype).view(ctx.shape)
        return dx, _add_to_main(weight_NK, dweight_NK), dbias_N, None, None, None


def _add_to_main(weight: Tensor, gradient: Tensor) -> Tensor:
    """Add a weight gradient to the main gradient in its own precision, as fused products do; return what autograd gets
    instead. Without a main gradient, as outside Megatron-Core's data parallelism, return the gradient."""
    if not hasattr(weight, "main_grad"):
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True  # tells Megatron-Core's hook to leave it
    return torch.empty_like(weight)  # the hook wants one
