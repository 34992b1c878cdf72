"""Is what this machine cannot do refused before anything starts, with the key to change?"""

import pytest
import torch

from nemotron_train.errors import ConfigError
from nemotron_train.platform.device import Platform
from nemotron_train.platform.support import check_support
from tests.plan.small import config_with

CPU = Platform(device=torch.device("cpu"), backend="gloo")
SIZES_FP8_TAKES = "model.mamba_num_heads=16"


def test_fp8_without_cuda_is_refused() -> None:
    """Fails if a CPU run that was asked for FP8 goes on in another precision."""
    with pytest.raises(ConfigError, match="fp8_block needs Transformer Engine on CUDA"):
        check_support(config_with("precision.format=fp8_block", SIZES_FP8_TAKES), CPU)


@pytest.mark.parametrize("key", ["gradients", "moments"])
def test_bf16_optimizer_state_without_transformer_engine_is_refused(key: str) -> None:
    """Fails if a CPU run keeps state in another format than asked, or dies inside Megatron-Core."""
    with pytest.raises(ConfigError, match=f"optim.{key}=bf16 needs the AdamW"):
        check_support(config_with("precision.format=bf16", f"optim.{key}=bf16"), CPU)


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_what_a_cpu_can_do_is_accepted(format: str) -> None:
    """Fails if a plain run is refused."""
    check_support(config_with(f"precision.format={format}"), CPU)


def test_context_parallelism_can_be_planned_but_not_trained() -> None:
    """Fails if a run starts whose ranks would each see the whole sample, or the key is not named."""
    with pytest.raises(ConfigError, match=r"parallel\.context_parallel_size=2"):
        check_support(config_with("parallel.context_parallel_size=2"), CPU)
