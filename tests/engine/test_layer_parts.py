"""Which layers does a run get, and is what it cannot have refused?"""

import pytest
import torch

from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.errors import ConfigError
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import Platform
from tests.plan.small import config_with

SIZES_FP8_TAKES = "model.mamba_num_heads=16"


def test_fp8_without_cuda_is_refused() -> None:
    """Fails if a CPU run that was asked for FP8 goes on in another precision."""
    plan = plan_run(config_with("precision.format=fp8_block", SIZES_FP8_TAKES), 1)
    with pytest.raises(ConfigError, match="fp8_block needs CUDA"):
        choose_layer_parts(plan, Platform(device=torch.device("cpu"), backend="gloo"))
