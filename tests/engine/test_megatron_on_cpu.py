"""Does every line of the CPU adaptor do what Megatron-Core needs of it? All in pool processes: it changes torch for
good."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

from nemotron_train.engine.megatron_on_cpu import run_megatron_on_cpu
from tests.ranks import RankPool


def install_where_cuda_is() -> str:
    """What the adaptor says when torch finds CUDA, and whether it has changed anything."""
    is_available, current_device = torch.cuda.is_available, torch.cuda.current_device
    torch.cuda.is_available = lambda: True
    try:
        run_megatron_on_cpu()
    except RuntimeError as error:
        return str(error) if torch.cuda.current_device is current_device else "changed torch"
    finally:
        torch.cuda.is_available = is_available
    return "installed"


def test_it_refuses_where_cuda_is(ranks: RankPool) -> None:
    """Fails if a GPU run could silently compute on the CPU."""
    assert ranks.run(install_where_cuda_is, 1) == ["The CPU adaptor must not be installed where CUDA is available."]


def devices_and_types() -> dict[str, Any]:
    """Where tensors asked for on CUDA end up, and what `Tensor.type` says."""
    run_megatron_on_cpu()
    on_cpu = torch.arange(3.0)
    tensors = {
        "zeros": torch.zeros(2, device="cuda"),
        "empty with index": torch.empty(2, device="cuda:0"),
        "tensor": torch.tensor([1.0], device=torch.device("cuda", 0)),
        "current device": torch.ones(2, device=torch.cuda.current_device()),
        "zeros_like": torch.zeros_like(on_cpu, device="cuda"),
        "to": on_cpu.to("cuda"),
        "to device": on_cpu.to(torch.device("cuda")),
        "to with dtype": on_cpu.to("cuda", torch.float64),
        "to by keyword": on_cpu.to(device="cuda:1"),
        "cuda": on_cpu.cuda(),
        "parameter": torch.nn.Parameter(on_cpu).cuda(),
    }
    return {
        "devices": {key: str(tensor.device) for key, tensor in tensors.items()},
        "values": all(
            torch.equal(tensors[key], on_cpu) for key in ("to", "to device", "to by keyword", "cuda", "parameter")
        ),
        "dtype": tensors["to with dtype"].dtype == torch.float64,
        "types": [on_cpu.to(dtype).type() for dtype in (torch.float32, torch.float16, torch.bfloat16)],
        "converted": on_cpu.type(torch.int64).dtype == torch.int64,
        "meta": str(torch.zeros(1, device="meta").device),
    }


def test_what_is_asked_for_on_cuda_is_on_the_cpu(ranks: RankPool) -> None:
    """Fails if a way of naming the device gets past the adaptor, a value changes, or another device is touched."""
    [found] = ranks.run(devices_and_types, 1)
    assert set(found["devices"].values()) == {"cpu"}, found["devices"]
    assert found["values"]
    assert found["dtype"]
    assert found["meta"] == "meta"


def test_types_are_named_as_the_optimizer_compares_them(ranks: RankPool) -> None:
    """Fails if `Tensor.type()` says anything but the CUDA names, or `type(dtype)` no longer converts."""
    [found] = ranks.run(devices_and_types, 1)
    assert found["types"] == ["torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert found["converted"]


def random_state_round_trips() -> list[bool]:
    """Draws before and after setting back the state, through torch.cuda and through Megatron-Core's own functions."""
    run_megatron_on_cpu()
    outcomes = []
    for get, put in (
        (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
        (megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state),
    ):
        state = get()
        first, second = torch.rand(4), torch.rand(4)
        put(state)
        outcomes += [torch.equal(torch.rand(4), first), not torch.equal(first, second)]
    torch.cuda.manual_seed(11)
    drawn = torch.rand(4)
    torch.manual_seed(11)
    return [*outcomes, torch.equal(torch.rand(4), drawn)]


def test_random_state_can_be_saved_and_set_back(ranks: RankPool) -> None:
    """Fails if recomputation would draw other numbers than the first forward pass."""
    assert ranks.run(random_state_round_trips, 1) == [[True] * 5]


def streams_and_second_install() -> list[bool]:
    run_megatron_on_cpu()
    replaced = {
        name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "Stream", "get_rng_state")
    }
    depth = torch._C._len_torch_function_stack()
    run_megatron_on_cpu()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(torch.cuda.Event())
        torch.cuda.default_stream().synchronize()
        torch.cuda.synchronize()
    return [
        all(getattr(torch.cuda, name) is function for name, function in replaced.items()),
        torch._C._len_torch_function_stack() == depth,
        torch.cuda.current_device() == torch.device("cpu"),
    ]


def test_streams_do_nothing_and_a_second_install_neither(ranks: RankPool) -> None:
    """Fails if waiting on a stream needs CUDA, or installing again stacks a second layer onto every torch call."""
    assert ranks.run(streams_and_second_install, 1) == [[True] * 3]


def test_transformer_engine_is_not_found_without_a_gpu(tmp_path: Path) -> None:
    """Fails if Megatron-Core takes the AdamW or the norm of an installed Transformer Engine, which need CUDA, on the
    CPU."""
    installed = tmp_path / "transformer_engine"
    installed.mkdir()
    (installed / "__init__.py").write_text("raise RuntimeError('imported')\n")
    command = (
        "import nemotron_train.engine.optimizer\n"
        "import megatron.core.optimizer as megatron\n"
        "print('plain:', megatron.USING_PYTORCH_OPTIMIZER)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert "plain: True" in done.stdout, done.stderr
