"""Is what this machine cannot do refused before anything starts, with the key to change?"""

from contextlib import nullcontext

import pytest
import torch

from nemotron_train.config.schema import PrecisionFormat
from nemotron_train.errors import ConfigError
from nemotron_train.platform.device import Platform
from nemotron_train.platform.support import GPU_LIBRARIES, check_support
from tests.plan.small import config_with

CPU = Platform(device=torch.device("cpu"), backend="gloo")
CUDA = Platform(device=torch.device("cuda", 0), backend="nccl")
SIZES_FP8_TAKES = "model.mamba_num_heads=16"


@pytest.mark.parametrize("format", ["bf16", "fp8_block", "fp8_current", "fp8_delayed"])
@pytest.mark.parametrize("missing", ["transformer_engine", "mamba_ssm", "causal_conv1d"])
def test_a_gpu_without_its_libraries_is_refused(format: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run dies of a missing library after its process groups met, or is sent to a format that needs it
    too."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name != missing else None)
    name = GPU_LIBRARIES[missing]
    with pytest.raises(ConfigError, match=rf"format={format} on a GPU.*not installed: {name}\. .*format=fp32"):
        check_support(config_with(f"precision.format={format}", SIZES_FP8_TAKES), CUDA)
    check_support(config_with("precision.format=fp32"), CUDA)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (["model.mamba_conv_kernel=5"], "mamba_conv_kernel=5: .* 2 to 4"),
        (["model.mamba_conv_kernel=1"], "mamba_conv_kernel=1: .* 2 to 4"),
        (["model.mamba_head_dim=9"], r"218 channels, .* multiples of 8: 10 of .*mamba_head_dim=9, and twice 2 of"),
        (
            ["parallel.context_parallel_size=2", "model.mamba_head_dim=12"],  # 248 of a whole layer
            "124 channels, .*: 5 of model.mamba_num_heads=10 x .* and twice 1 of",
        ),
    ],
)
def test_a_convolution_that_no_kernel_computes_is_refused(
    changes: list[str], names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run dies inside a kernel of the GPU, or other devices and models are refused what they can do."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    in_bf16, in_fp32 = (config_with(f"precision.format={format}", *changes) for format in ("bf16", "fp32"))
    with pytest.raises(ConfigError, match=names):
        check_support(in_bf16, CUDA)
    check_support(in_bf16, CPU)
    check_support(in_fp32, CUDA)
    check_support(config_with("precision.format=bf16", "model.layer_pattern='*-'", *changes), CUDA)


@pytest.mark.parametrize("key", ["gradients", "moments"])
def test_bf16_optimizer_state_without_transformer_engine_is_refused(key: str) -> None:
    """Fails if a CPU run keeps state in another format than asked, or dies inside Megatron-Core."""
    with pytest.raises(ConfigError, match=f"optim.{key}=bf16 needs the AdamW"):
        check_support(config_with("precision.format=bf16", f"optim.{key}=bf16"), CPU)


@pytest.mark.parametrize("format", PrecisionFormat)
def test_what_a_cpu_can_do_is_accepted(format: PrecisionFormat) -> None:
    """Fails if a plain run, or one that a CPU emulates, is refused."""
    check_support(config_with(f"precision.format={format.value}", SIZES_FP8_TAKES), CPU)


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


def test_fp8_primary_weights_are_refused_where_fp8_is_emulated() -> None:
    """Fails if a CPU run starts that would hold other weights than it was asked to."""
    config = config_with("precision.format=fp8_block", SIZES_FP8_TAKES, "precision.primary_weights=fp8")
    with pytest.raises(ConfigError, match=r"primary_weights=fp8 with precision.format=fp8_block.*primary_weights=bf16"):
        check_support(config, CPU)


OVERLAP = (
    "precision.format=bf16", "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true",
    "parallel.overlap_tensor_comm=true",
)  # fmt: skip


def test_overlapped_tensor_communication_is_refused_where_there_are_no_user_buffers() -> None:
    """Fails if a CPU run accepts the option and ignores it."""
    with pytest.raises(ConfigError, match=r"overlap_tensor_comm=true needs Transformer Engine.*=false"):
        check_support(config_with(*OVERLAP), CPU)


def test_graphs_are_refused_where_there_is_no_gpu() -> None:
    """Fails if a CPU run accepts the option and ignores it."""
    config = config_with("train.cuda_graphs=true", "precision.format=fp32")
    with pytest.raises(ConfigError, match=r"cuda_graphs=true needs a GPU, and this run is on cpu\. Set \S+=false"):
        check_support(config, CPU)
    check_support(config, CUDA)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_graphs_are_refused_where_their_memory_would_move(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run starts whose collectives read what the allocator has moved."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    config = config_with("train.cuda_graphs=true")
    monkeypatch.setenv(name, "max_split_size_mb:128,expandable_segments:True")
    check_support(config_with(), CUDA)
    with pytest.raises(ConfigError, match=rf"cuda_graphs=true with {name}=\S+expandable_segments:True.*REGISTER=0"):
        check_support(config, CUDA)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    check_support(config, CUDA)


@pytest.mark.parametrize(("gpus", "fits"), [(1, False), (2, True)])
def test_overlapped_tensor_communication_stays_within_a_machine(
    gpus: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if ranks of two machines try to write into each other's memory, or those of one may not."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # every library is there
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    expected = (
        nullcontext()
        if fits
        else pytest.raises(ConfigError, match=r"tensor_parallel_size=2.*this machine are 1\. Set \S+=false\.$")
    )
    with expected:
        check_support(config_with(*OVERLAP), CUDA)
