"""Which class implements each part of a layer on this platform: the place to swap one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.config.schema import PrecisionFormat, PrimaryWeights
from nemotron_train.engine import plain_layers
from nemotron_train.engine.emulated_layers import emulated
from nemotron_train.engine.gathered_attention import GatheredAttention
from nemotron_train.engine.layer_precision import LayerPrecision
from nemotron_train.plan.run_plan import RunPlan
from nemotron_train.platform.device import Platform
from nemotron_train.precision.emulation import Emulation
from nemotron_train.precision.recipe import Fp8Recipe, Scaling, fp8_recipe


@dataclass(frozen=True)
class LayerParts:
    """Classes, or functions, with the constructors Megatron-Core's modules call."""

    name: str  # for the log
    norm: type  # takes configuration, size and epsilon
    column_linear: type
    norm_column_linear: type  # norm + column-parallel linear in one module
    row_linear: type
    core_attention: Callable[..., nn.Module]
    embedding: type  # has Megatron-Core's constructor; not for a table that the output layer shares
    output_linear: Callable[[TransformerConfig, int, Any], nn.Module]  # takes the vocabulary's size and the TP group
    recompute: Callable[[Callable[[Tensor], Tensor], Tensor, Any], Tensor]  # runs a function again in the backward
    precision: LayerPrecision
    fuses_weight_gradients: bool  # products add weight gradients to the main gradients themselves


def choose_layer_parts(plan: RunPlan, platform: Platform) -> LayerParts:
    """Choose Transformer Engine on CUDA, plain torch on the CPU and in float32."""
    if not platform.is_cuda or plan.config.precision.format is PrecisionFormat.fp32:
        return plain_parts(plan, platform)
    return transformer_engine_parts(plan)


def plain_parts(plan: RunPlan, platform: Platform) -> LayerParts:
    """Plain torch layers; they run on the CPU and on CUDA, with FP8 emulated where the plan says so."""
    parts = LayerParts(
        name=f"plain torch layers on {platform.device.type}",
        norm=plain_layers.Norm,
        column_linear=plain_layers.ColumnParallelLinear,
        norm_column_linear=plain_layers.NormColumnParallelLinear,
        row_linear=plain_layers.RowParallelLinear,
        core_attention=_plain_attention(plan),
        embedding=LanguageModelEmbedding,
        output_linear=plain_layers.output_linear,
        recompute=lambda run, x, group: tensor_parallel.checkpoint(run, False, x),
        precision=LayerPrecision(),
        fuses_weight_gradients=False,
    )
    recipe = fp8_recipe(plan.config.precision)
    if recipe is None:
        return parts
    emulation = Emulation(recipe)
    return replace(
        parts,
        name=f"{parts.name}, {plan.config.precision.format.value} emulated in float32",
        column_linear=emulated(parts.column_linear, emulation),
        norm_column_linear=emulated(parts.norm_column_linear, emulation),
        row_linear=emulated(parts.row_linear, emulation),
        recompute=lambda run, x, group: tensor_parallel.checkpoint(emulation.to_recompute(run), False, x),
        precision=_precision(plan, recipe, emulation.enter),
    )


def transformer_engine_parts(plan: RunPlan) -> LayerParts:
    """Transformer Engine's layers, with FP8 where the plan says so."""
    from nemotron_train.engine import te_layers  # imports Transformer Engine, which only GPU machines have

    recipe = fp8_recipe(plan.config.precision)
    precision = LayerPrecision()
    if recipe is not None:
        precision = _precision(plan, recipe, partial(te_layers.enter_fp8, recipe))
    if recipe is not None and plan.config.precision.primary_weights is PrimaryWeights.fp8:
        precision = replace(precision, fp8_weights=partial(te_layers.fp8_weights, recipe))
    has_cap = plan.config.model.attention_logit_cap is not None  # Transformer Engine's attention knows none
    return LayerParts(
        name="Transformer Engine" + (", attention in plain torch" if has_cap else ""),
        norm=te_layers.TENorm,
        column_linear=te_layers.TEColumnParallelLinear,
        norm_column_linear=te_layers.TELayerNormColumnParallelLinear,
        row_linear=te_layers.TERowParallelLinear,
        core_attention=_plain_attention(plan) if has_cap else te_layers.DotProductAttention,
        embedding=te_layers.InPlaceEmbedding,
        output_linear=te_layers.output_linear,
        recompute=te_layers.recompute,
        precision=precision,
        fuses_weight_gradients=True,
    )


def _plain_attention(plan: RunPlan) -> Callable[..., nn.Module]:
    cap = plan.config.model.attention_logit_cap
    if plan.layout.context > 1:
        return partial(GatheredAttention, cap)
    return plain_layers.CausalAttention if cap is None else partial(plain_layers.CappedAttention, cap)


def _precision(plan: RunPlan, recipe: Fp8Recipe, enter_fp8: Callable[[Any], AbstractContextManager]) -> LayerPrecision:
    return LayerPrecision(
        fp8_layers=plan.fp8_layers, whole_stack=recipe.scaling is Scaling.delayed, enter_fp8=enter_fp8
    )
