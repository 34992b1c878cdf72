"""Which class implements each part of a layer on this platform: the place to swap one."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.config.schema import PrecisionFormat
from nemotron_train.engine import plain_layers
from nemotron_train.engine.gathered_attention import GatheredAttention
from nemotron_train.engine.layer_precision import LayerPrecision
from nemotron_train.plan.run_plan import RunPlan
from nemotron_train.platform.device import Platform
from nemotron_train.precision.recipe import Scaling, fp8_recipe


@dataclass(frozen=True)
class LayerParts:
    """Classes, or functions, with the constructors Megatron-Core's modules call."""

    name: str  # for the log
    norm: Callable[..., nn.Module]
    norm_column_linear: type  # RMSNorm + column-parallel linear in one module
    row_linear: type
    core_attention: type
    output_linear: Callable[[TransformerConfig, int, Any], nn.Module]  # takes the vocabulary's size and the TP group
    checkpoint: Callable[[Callable[[Tensor], Tensor], Tensor, Any], Tensor]  # recomputes a function in the backward
    precision: LayerPrecision
    fuses_weight_gradients: bool  # products add weight gradients to the main gradients themselves


def choose_layer_parts(plan: RunPlan, platform: Platform) -> LayerParts:
    """Choose Transformer Engine on CUDA, plain torch on the CPU, in float32, and where it is not installed."""
    is_plain = not platform.is_cuda or plan.config.precision.format is PrecisionFormat.fp32
    if is_plain or importlib.util.find_spec("transformer_engine") is None:
        return plain_parts(platform, plan.layout.context)
    return transformer_engine_parts(plan)


def plain_parts(platform: Platform, context_parallel_size: int = 1) -> LayerParts:
    """Plain torch layers; they run on the CPU and on CUDA."""
    return LayerParts(
        name=f"plain torch layers on {platform.device.type}",
        norm=plain_layers.RMSNorm,
        norm_column_linear=plain_layers.NormColumnParallelLinear,
        row_linear=plain_layers.RowParallelLinear,
        core_attention=plain_layers.CausalAttention if context_parallel_size == 1 else GatheredAttention,
        output_linear=plain_layers.output_linear,
        checkpoint=lambda run, x, group: tensor_parallel.checkpoint(run, False, x),
        precision=LayerPrecision(),
        fuses_weight_gradients=False,
    )


def transformer_engine_parts(plan: RunPlan) -> LayerParts:
    """Transformer Engine's layers, with FP8 where the plan says so."""
    from nemotron_train.engine import te_layers  # imports Transformer Engine, which only GPU machines have

    recipe = fp8_recipe(plan.config.precision)
    precision = LayerPrecision()
    if recipe is not None:
        precision = LayerPrecision(
            fp8_layers=plan.fp8_layers,
            whole_stack=recipe.scaling is Scaling.delayed,
            enter_fp8=partial(te_layers.enter_fp8, recipe),
        )
    return LayerParts(
        name="Transformer Engine",
        norm=te_layers.rms_norm,
        norm_column_linear=te_layers.TELayerNormColumnParallelLinear,
        row_linear=te_layers.TERowParallelLinear,
        core_attention=te_layers.DotProductAttention,
        output_linear=te_layers.output_linear,
        checkpoint=te_layers.checkpoint,
        precision=precision,
        fuses_weight_gradients=True,
    )
