"""Takes measurements one by one into a table, and tells where each number comes from."""

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from nemotron_train.errors import ConfigError
from nemotron_train.plan.gpu_table import FORMATS, SHAPE, gpu_from
from nemotron_train.plan.measured import H200
from nemotron_train.platform.device import Platform
from nemotron_train.probe import one_gpu
from nemotron_train.probe.chunks import Bench, Measurement

PACKAGES = ("torch", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d")
SHIPPED = "not measured: the shipped table's"
Tell = Callable[[str], object]  # told the key of the measurement that begins


def measure_one_gpu(bench: Bench, tell: Tell) -> dict[str, Any]:
    """Fill a table with what one GPU tells; the rest is the shipped table's, and says so."""
    model, tokens = bench.config.model, bench.config.train.seq_length
    table: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.platform.is_cuda else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "summary": "measured by --probe; splitting layers and networks as in the shipped table",
        "versions": versions(),
        "memory_gib": round(memory_gib(bench.platform), 1),
        "model": {name: getattr(model, name) for name in SHAPE},
        "tokens": tokens,
        "layer_ms": {},
        "core_ms": {},
        "tensor_parallel_ms": {format.value: H200.tensor_parallel_ms[format] for format in FORMATS},
        "node_gb_per_s": H200.node_gb_per_s,
        "network_gb_per_s": H200.network_gb_per_s,
        "notes": {
            "layer_ms": "forward and backward of a layer in a stack of four of its kind, weight gradients accumulated, "
            "weights quantised before, as in a micro-batch that is not a step's first; medians",
            "launch_ms": "the CPU's time for a layer of a stack of four, [forward, backward], 256 tokens",
            "core_ms": "alone, in bf16",
            "norm_and_residual_ms": "bf16, of samples four times as long, a quarter of the time",
            "head_ms": "a model without layers: embedding, final norm, output layer, loss",
            "optimizer_ps_per_parameter": "float32 state, nothing clipped; twelve MLP layers, or what memory holds",
            "first_pass_ps_per_weight": "four MLP layers with weights quantised in every pass, less layer_ms",
            **{name: SHIPPED for name in ("tensor_parallel_ms", "node_gb_per_s", "network_gb_per_s")},
        },
    }
    enter_all(table, one_gpu.measurements(bench), tell)
    return table


def enter_all(table: dict[str, Any], measurements: Iterable[Measurement], tell: Tell) -> None:
    """Measure, in order. An FP8 format that this GPU or its libraries refuse is left out, with their reason."""
    for key, measure in measurements:
        tell(key)
        try:
            value = measure()
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or ".fp8_" not in key:
                raise
            table["notes"][key] = f"not measured: {(str(error).splitlines() or [type(error).__name__])[0]}"
            continue
        *path, last = key.split(".")
        section = table
        for name in path:
            section = section.setdefault(name, {})
        section[last] = _rounded(value) if isinstance(value, float) else [_rounded(each) for each in value]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def note_two_gpus(table: dict[str, Any]) -> None:
    """Say that two GPUs were measured, which `two_gpus.measurements` did."""
    table["summary"] = "measured by --probe on one GPU and on two; between nodes as in the shipped table"
    table["notes"] |= {
        "tensor_parallel_ms": "a layer on two ranks beyond what the planner makes of the rest of this table, mean of "
        "the 12B's layers",
        "node_gb_per_s": "gathering a hidden state over two GPUs",
    }


def write_table(table: dict[str, Any], file: Path) -> None:
    """Write a table, then check it: one that the planner refuses is kept, to be mended.

    Raises:
        ConfigError: it cannot be written, or the planner cannot read it.
    """
    try:
        file.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The table {file} cannot be written: {error.strerror}.") from error
    gpu_from(table, file, "the table")


def memory_gib(platform: Platform) -> float:
    if platform.is_cuda:
        return torch.cuda.get_device_properties(platform.device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def versions() -> dict[str, str]:
    """Return the versions of what computes, of those that are here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
