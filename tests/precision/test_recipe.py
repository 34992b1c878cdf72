"""What does each key of FP8 do to the recipe, and do Megatron-Core's schedules learn of it?"""

import pytest
import torch

from nemotron_train.config.schema import PrecisionFormat
from nemotron_train.engine.layer_parts import plain_parts
from nemotron_train.engine.mcore_config import build_ddp_config, build_optimizer_config, build_transformer_config
from nemotron_train.ops.implementations import operations
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import Platform
from nemotron_train.precision.recipe import Fp8Recipe, Scaling, fp8_recipe
from tests.plan.small import config_with

SIZES_FP8_TAKES = "model.mamba_num_heads=16"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"format": "fp8_block"}, Fp8Recipe(Scaling.block, wide_gradients=False, power_of_two=True)),
        ({"format": "fp8_current"}, Fp8Recipe(Scaling.current, wide_gradients=True, power_of_two=False)),
        ({"format": "fp8_delayed"}, Fp8Recipe(Scaling.delayed, wide_gradients=True, power_of_two=False)),
        (
            {"format": "fp8_block", "fp8_scales": "fp32"},
            Fp8Recipe(Scaling.block, wide_gradients=False, power_of_two=False),
        ),
        (
            {"format": "fp8_current", "fp8_scales": "power_of_two"},
            Fp8Recipe(Scaling.current, wide_gradients=True, power_of_two=True),
        ),
        ({"format": "bf16"}, None),
    ],
)
def test_the_recipe_is_what_was_asked_for(changes: dict[str, str], wanted: Fp8Recipe | None) -> None:
    """Fails if a format gets another's scales or gradients, or if precision.fp8_scales does nothing."""
    config = config_with(*(f"precision.{key}={value}" for key, value in changes.items()))
    assert fp8_recipe(config.precision) == wanted


@pytest.mark.parametrize(
    ("precision", "names"),
    [
        (PrecisionFormat.bf16, (None, "delayed")),  # the second is Megatron-Core's default, unused without FP8
        (PrecisionFormat.fp8_block, ("e4m3", "blockwise")),
        (PrecisionFormat.fp8_current, ("hybrid", "tensorwise")),
        (PrecisionFormat.fp8_delayed, ("hybrid", "delayed")),
    ],
)
def test_schedules_know_that_a_run_is_in_fp8(precision: PrecisionFormat, names: tuple[str | None, str]) -> None:
    """Fails if Megatron-Core's schedules take the run for one without FP8: they would not tell layers that a step
    begins, and all steps would run with the FP8 copies of the first step's weights."""
    plan = plan_run(config_with(f"precision.format={precision.value}", SIZES_FP8_TAKES), 1)
    platform = Platform(device=torch.device("cpu"), backend="gloo")
    config = build_transformer_config(plan, operations("torch"), plain_parts(plan, platform))
    assert (config.fp8, config.fp8_recipe) == names


@pytest.mark.parametrize(
    ("gradients", "moments", "precision_aware"),
    [
        ("fp32", "fp32", False),
        # Megatron-Core refuses these without Transformer Engine.
        pytest.param("bf16", "fp32", True, marks=pytest.mark.gpu),
        pytest.param("fp32", "bf16", True, marks=pytest.mark.gpu),
        pytest.param("bf16", "bf16", True, marks=pytest.mark.gpu),
    ],
)
def test_gradients_and_moments_are_kept_as_asked(gradients: str, moments: str, precision_aware: bool) -> None:
    """Fails if optim.gradients or optim.moments does nothing, or one acts as the other."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}
    config = config_with("precision.format=bf16", f"optim.gradients={gradients}", f"optim.moments={moments}")
    optimizer = build_optimizer_config(config)
    assert optimizer.main_grads_dtype is dtype[gradients]
    assert optimizer.exp_avg_dtype is optimizer.exp_avg_sq_dtype is dtype[moments]
    assert optimizer.use_precision_aware_optimizer is precision_aware
    assert build_ddp_config(config).grad_reduce_in_fp32 is (gradients == "fp32")
