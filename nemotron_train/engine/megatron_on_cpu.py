"""Lets Megatron-Core, which assumes CUDA, run on a machine without it. Never active where CUDA is.

Megatron-Core 0.16 asks for CUDA in three ways, and each gets its CPU answer here:
1. functions of `torch.cuda` (current device, streams, random state): replaced by CPU equivalents;
2. tensors made on, or moved to, the device "cuda": a global `TorchFunctionMode` sends them to the CPU;
3. `Tensor.type()` compared with names such as "torch.cuda.FloatTensor" (optimizers): the same mode answers with those
names.

To be deleted when Megatron-Core takes its device from its caller.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _NoStream:
    """Stands in for a CUDA stream or event where all work is done in order: waiting and recording have nothing to
    do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _cpu_if_cuda(device: Any) -> Any:
    is_cuda = (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )
    return _CPU if is_cuda else device


class CudaMeansCpu(TorchFunctionMode):
    """While active, a tensor asked for on CUDA is made on the CPU."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.", 1)
        if function is torch.Tensor.to:
            args = tuple(_cpu_if_cuda(arg) for arg in args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _cpu_if_cuda(kwargs["device"])}
        return function(*args, **kwargs)


def _set_cpu_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _get_cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


_active: list[CudaMeansCpu] = []


def run_megatron_on_cpu() -> None:
    """Install the adaptor in this process, for good. Does nothing the second time.

    Raises:
        RuntimeError: CUDA is available; then Megatron-Core needs no help.
    """
    if torch.cuda.is_available():
        raise RuntimeError("The CPU adaptor must not be installed where CUDA is available.")
    if _active:
        return
    no_stream = _NoStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,  # Megatron-Core passes the result on as `device=`
        "synchronize": lambda *args: None,
        "get_rng_state": _get_cpu_rng_state,  # recomputation saves and restores it
        "set_rng_state": _set_cpu_rng_state,
        "manual_seed": _manual_seed,
        "default_stream": lambda *args: no_stream,
        "current_stream": lambda *args: no_stream,
        "stream": lambda *args: contextlib.nullcontext(),
        "Stream": _NoStream,
        "Event": _NoStream,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    mode = CudaMeansCpu()
    mode.__enter__()
    _active.append(mode)
    # Megatron-Core reaches the CUDA generator through functions of its own as well.
    megatron_random._get_cuda_rng_state = _get_cpu_rng_state
    megatron_random._set_cuda_rng_state = _set_cpu_rng_state
