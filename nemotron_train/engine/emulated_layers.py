"""The plain linear layers with FP8 products emulated, and a record of the products that really had FP8 operands.

Transformer Engine gathers what sequence parallelism has split after quantising it. It makes sure that this changes
nothing (maxima reduced over the ranks; only whole blocks, see `plan/precision_rules.py`), so here it is gathered first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemotron_train.precision.emulation import DelayedQuantizers, Emulation, Quantizers, fp8_linear
from nemotron_train.precision.fp8_reference import Fp8Format

# Shapes: S sequence, s this rank's part of it, B micro-batch, K inputs of the layer.


def emulated(linear: type, emulation: Emulation) -> type:
    """Return the parallel linear layer with its products in FP8 wherever `emulation` is entered."""
    return type(f"Emulated{linear.__name__}", (_EmulatedLinear, linear), {"emulation": emulation})


class _EmulatedLinear(nn.Module):
    """Stands before one of Megatron-Core's parallel linears; outside FP8 that computes as ever."""

    emulation: ClassVar[Emulation]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_first_microbatch = True  # set again by Megatron-Core's schedules when a step begins
        self.quantizers: Quantizers = self.emulation.new_quantizers()

    def normalize(self, x_sBD: Tensor) -> Tensor:
        """With delayed scaling a norm's result is quantised before it is rounded to bfloat16: the kernel of the norm
        does it, as it knows the scale."""
        in_float32 = self.emulation.region is not None and self.emulation.is_delayed
        return super().normalize(x_sBD.float() if in_float32 else x_sBD)

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *args: Any,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Megatron-Core's seam: the product with what surrounds it on the ranks of a column-parallel layer."""
        if self.emulation.region is None:
            return super()._forward_impl(
                input,
                weight,
                *args,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **kwargs,
            )
        if sequence_parallel or allreduce_dgrad:
            input = _ColumnParallelInput.apply(input, tp_group, sequence_parallel, weight.dtype)
        fresh, self.is_first_microbatch = self.is_first_microbatch, False
        return fp8_linear(input, weight, self.quantizers, self.emulation, fresh=fresh, bias_N=bias)

    def get_extra_state(self) -> Tensor | None:
        """What a checkpoint keeps beside the weight, under the key that Transformer Engine's layers use."""
        return self.quantizers.scales.to_bytes() if isinstance(self.quantizers, DelayedQuantizers) else None

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and isinstance(self.quantizers, DelayedQuantizers):
            self.quantizers.scales.from_bytes(state)


class _ColumnParallelInput(torch.autograd.Function):
    """Gathers the sequence of an input, if it is split; sums the input's gradient over the tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, x_sBK: Tensor, group: Any, is_split: bool, gradient_dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.is_split, ctx.gradient_dtype = group, is_split, gradient_dtype
        if not is_split:
            return x_sBK.view_as(x_sBK)
        x_SBK = x_sBK.new_empty(x_sBK.shape[0] * group.size(), *x_sBK.shape[1:])
        dist.all_gather_into_tensor(x_SBK, x_sBK.contiguous(), group=group)
        return x_SBK

    @staticmethod
    def backward(ctx: Any, dx_SBK: Tensor) -> tuple[Tensor | None, ...]:
        dx_SBK = dx_SBK.to(ctx.gradient_dtype).contiguous()  # autograd may have widened it to x's dtype
        if ctx.is_split:
            dx_sBK = dx_SBK.new_empty(dx_SBK.shape[0] // ctx.group.size(), *dx_SBK.shape[1:])
            dist.reduce_scatter_tensor(dx_sBK, dx_SBK, group=ctx.group)
            return dx_sBK, None, None, None
        dx_SBK = dx_SBK.clone()
        dist.all_reduce(dx_SBK, group=ctx.group)
        return dx_SBK, None, None, None


@dataclass(frozen=True)
class QuantizedProduct:
    linear: str  # name of the layer in the model, as in the plan's list of products
    product: str  # forward, data gradient, weight gradient
    formats: tuple[Fp8Format, Fp8Format]  # of its operands


@contextmanager
def record_quantized_products(model: nn.Module) -> Iterator[list[QuantizedProduct]]:
    """List, while entered, every product of the model's linear layers whose operands were quantised."""
    ran: list[QuantizedProduct] = []
    linears = {name: module for name, module in model.named_modules() if isinstance(module, _EmulatedLinear)}
    for name, linear in linears.items():

        def take(product: str, first: Fp8Format, second: Fp8Format, name: str = name) -> None:
            ran.append(QuantizedProduct(name, product, (first, second)))

        linear.quantizers.listener = take
    yield ran
    for linear in linears.values():
        linear.quantizers.listener = None
