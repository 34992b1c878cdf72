"""Megatron-Core's distributed optimizer: building it, setting its rates, and taking a step that skips non-finite gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from nemotron_train.engine.wrap import ModelChunk


Optimizer = MegatronOptimizer  # the name the rest of the house uses


@dataclass(frozen=True)
class OptimizerStep:
    updated: bool  # False: a gradient was not finite, and nothing changed
    grad_norm: float  # L2 norm over the whole model, before clipping


class GroupOfParameters(Protocol):
    """A parameter group by name; `optim/parameter_groups.py` defines them."""

    name: str
    decay_factor: float

    def holds(self, name: str, /) -> bool: ...


def build_optimizer(config: OptimizerConfig, chunks: Sequence[ModelChunk], groups: Sequence[GroupOfParameters]) -> Optimizer:
    """Build AdamW on sharded float32 master weights. Parameters in none of `groups` form the default group."""
    overrides = {
        ParamKey(
            with_name_predicate=ParamWithNamePredicate(name=group.name, fn=lambda parameter, name, group=group: group.holds(name))
        ): ParamGroupOverride(wd_mult=group.decay_factor, group_name=group.name)
        for group in groups
    }
    return get_megatron_optimizer(config, list(chunks), config_overrides=overrides, use_gloo_process_groups=False)


def set_rates(optimizer: Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of every parameter group for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def take_step(optimizer: Optimizer) -> OptimizerStep:
    """Clip and apply the reduced gradients; with a NaN or infinity anywhere, leave weights and moments untouched.

    The norm is a sum over all ranks, so every rank comes to the same decision.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return OptimizerStep(updated=False, grad_norm=grad_norm)
    clip = optimizer.config.clip_grad
    if clip > 0.0:
        for part in optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(part.get_parameters(), clip, grad_norm)
    optimizer.step_with_ready_grads()
    return OptimizerStep(updated=True, grad_norm=grad_norm)
