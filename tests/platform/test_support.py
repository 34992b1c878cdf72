"""Is what this machine cannot do refused before anything starts, with the key to change?"""

from contextlib import nullcontext

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


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        (["precision.format=bf16", "data.document_boundary=reset"], False),
        (["precision.format=fp32", "data.document_boundary=reset"], True),
        (["precision.format=bf16"], True),
    ],
)
def test_documents_split_over_ranks_are_refused_where_transformer_engine_attends(
    changes: list[str], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run gets so far that attention dies of documents of any length, or plain layers are refused what they
    can do."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # every library is there
    config = config_with("parallel.context_parallel_size=2", *changes)
    gpu = Platform(device=torch.device("cuda"), backend="nccl")
    expected = (
        nullcontext() if fits else pytest.raises(ConfigError, match=r"document_boundary=reset.*context_parallel_")
    )
    with expected:
        check_support(config, gpu)
    check_support(config, CPU)
