"""Megatron-Core's distributed optimizer: building it, setting its rates, and taking a step that skips non-finite
gradients."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from nemotron_train.config.schema import OptimSection
from nemotron_train.engine.adamw_in_parts import update_in_parts
from nemotron_train.engine.wrap import ModelChunk

Optimizer: TypeAlias = MegatronOptimizer  # the name the rest of the house uses


@dataclass(frozen=True)
class OptimizerStep:
    updated: bool  # False: a gradient was not finite, and nothing changed
    grad_norm: float  # L2 norm over the whole model, before clipping


class GroupOfParameters(Protocol):
    """A parameter group, by name; `optim/parameter_groups.py` defines them."""

    @property
    def name(self) -> str: ...
    @property
    def holds(self) -> Callable[[str], bool]: ...
    @property
    def decay_factor(self) -> float: ...


def build_optimizer(
    config: OptimizerConfig, chunks: Sequence[ModelChunk], groups: Sequence[GroupOfParameters]
) -> Optimizer:
    """Build AdamW on sharded float32 master weights. Parameters in none of `groups` form the default group."""
    overrides = {
        ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                name=group.name, fn=lambda parameter, name, group=group: group.holds(name)
            )
        ): ParamGroupOverride(wd_mult=group.decay_factor, group_name=group.name)
        for group in groups
    }
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides=overrides, use_gloo_process_groups=False)
    if config.use_precision_aware_optimizer and config.exp_avg_dtype is not torch.float32:
        for part in optimizer.chained_optimizers:
            update_in_parts(part.optimizer)
    return optimizer


def set_hyperparameters(optimizer: Optimizer, optim: OptimSection, learning_rate: float) -> None:
    """Set what the coming step uses in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (optim.adam_beta1, optim.adam_beta2)
        group["eps"] = optim.adam_epsilon


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load moments, master weights and the count of steps. What else a parameter group says stays: a checkpoint brings
    settings of the AdamW that wrote it, and torch's and Transformer Engine's each know some that the other lacks."""
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update({key: value for key, value in settings.items() if key != "step"})
        if "step" in group:
            group["step"] = int(group["step"])  # torch counts in a float, which Transformer Engine's kernel refuses


def take_step(optimizer: Optimizer) -> OptimizerStep:
    """Clip and apply the reduced gradients; with a NaN or infinity anywhere, leave weights and moments untouched.

    The norm is a sum over all ranks, so every rank comes to the same decision.
    """
    optimizer.prepare_grads()
    grad_norm = math.hypot(*(_grad_norm(part) for part in optimizer.chained_optimizers))
    if not math.isfinite(grad_norm):
        return OptimizerStep(updated=False, grad_norm=grad_norm)
    clip = optimizer.config.clip_grad
    if clip > 0.0:
        for part in optimizer.chained_optimizers:
            _clip(part, clip, grad_norm)
    optimizer.step_with_ready_grads()
    return OptimizerStep(updated=True, grad_norm=grad_norm)


def _grad_norm(part: Any) -> float:
    """Compute the L2 norm of the gradients of one of the optimizers that make up the whole, over all ranks."""
    gradients = part.get_main_grads_for_grad_norm()
    group = part.get_grad_stats_parallel_group()
    assert all(gradient.dtype in _gradient_dtypes(part) for gradient in gradients)
    of_dtype = ([g for g in gradients if g.dtype is dtype] for dtype in _gradient_dtypes(part))
    return math.hypot(*(get_grad_norm_fp32(some, grad_stats_parallel_group=group) for some in of_dtype))


def _clip(part: Any, most: float, grad_norm: float) -> None:
    # With moments or gradients below float32 the gradients are kept beside the parameter, not as its `grad`.
    beside = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    name = "decoupled_grad" if beside else "grad"
    present = [parameter for parameter in part.get_parameters() if getattr(parameter, name, None) is not None]
    for dtype in _gradient_dtypes(part):
        parameters = [parameter for parameter in present if getattr(parameter, name).dtype is dtype]
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, most, grad_norm, use_decoupled_grad=beside)


def _gradient_dtypes(part: Any) -> list[torch.dtype]:
    """Name the types of gradients, the same on every rank: those of float32 vectors stay in float32.

    The kernels of norm and clipping, Transformer Engine's and apex's, read a list of tensors as if all were of the type
    of the first, so each type needs a list of its own.
    """
    return list(dict.fromkeys([torch.float32, part.config.main_grads_dtype]))


def allocate_state(optimizer: Optimizer) -> None:
    """Give torch's AdamW, which has no state before its first update, moments and step counters to load a checkpoint
    into, or to save. What is there stays.

    Megatron-Core (0.16) asks for the counters before loading, and then forgets to set them parameter by parameter; it
    has read them from the parameter groups by then. To be deleted when its `_set_main_param_and_optimizer_states`
    leaves `step` alone.
    """
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if not isinstance(adam, torch.optim.AdamW):
            continue  # Transformer Engine's and apex's AdamW keep the step in the group
        for group in adam.param_groups:
            for parameter in group["params"]:
                state = adam.state[parameter]
                if "step" not in state:
                    zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    state.update({"step": torch.tensor(0.0), **zeros})
        part._set_main_param_and_optimizer_states = partial(_set_state, part)


def _set_state(part: Any, model_parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    group, order = part.model_param_group_index_map[model_parameter]
    main_parameter = part.optimizer.param_groups[group]["params"][order]
    state = part.optimizer.state[main_parameter]
    # Megatron-Core has given all parameters one step tensor between them; AdamW would advance it once for each.
    step = state["step"] = state["step"].clone()
    type(part)._set_main_param_and_optimizer_states(part, model_parameter, {**tensors, "step": step})
