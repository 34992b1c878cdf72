"""Are the buffers for tensor-parallel ranks those that the run's products will look for?

On the CPU, with a stand-in for Transformer Engine that notes what it is asked for;
`tests/run/test_tensor_overlap_on_gpus.py` has the real one.
"""

import os
import sys
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch

from nemotron_train.engine.layer_parts import plain_parts
from nemotron_train.engine.mcore_config import build_transformer_config
from nemotron_train.engine.user_buffers import user_buffers
from nemotron_train.ops.implementations import operations
from nemotron_train.plan.run_plan import RunPlan, plan_run
from nemotron_train.platform.device import Platform
from tests.plan.small import experiment_with

Mode = Enum("Mode", ["FP8", "NONE"])


class Notes(ModuleType):
    UserBufferQuantizationMode = Mode

    def __init__(self) -> None:
        super().__init__("transformer_engine.pytorch")
        self.asked: list[dict[str, Any]] = []

    def initialize_ub(self, shape: list[int], tp_size: int, **options: Any) -> None:
        skips_multicast = os.environ["UB_SKIPMC"]
        self.asked.append({"shape": shape, "tp_size": tp_size, "skips_multicast": skips_multicast, **options})

    def destroy_ub(self) -> None:
        self.asked.append({})


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes, package = Notes(), ModuleType("transformer_engine")
    package.pytorch = notes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", notes)
    monkeypatch.setenv("UB_SKIPMC", "0")  # and put back what was there
    return notes


def planned(*changes: str, overlap: bool = True) -> RunPlan:
    option = f"parallel.overlap_tensor_comm={str(overlap).lower()}"
    return plan_run(experiment_with("nemotron_nano_12b_v2", "train.global_batch_size=8", option, *changes), 8)


@pytest.mark.parametrize(
    ("changes", "tokens", "modes"),
    [
        (["precision.format=bf16", "precision.bf16_first_layers=0", "precision.bf16_last_layers=0"], 8192, [Mode.NONE]),
        (["precision.format=fp8_current"], 8192, [Mode.FP8, Mode.NONE]),
        (
            ["precision.format=fp8_current", "precision.bf16_first_layers=0", "precision.bf16_last_layers=0"],
            8192,
            [Mode.FP8],
        ),
        (["precision.format=fp8_current", "train.micro_batch_size=2"], 16384, [Mode.FP8, Mode.NONE]),
        (["precision.format=fp8_current", "parallel.context_parallel_size=2"], 4096, [Mode.FP8, Mode.NONE]),
    ],
)
def test_buffers_hold_the_tokens_of_a_tensor_parallel_group(
    notes: Notes, changes: list[str], tokens: int, modes: list[Mode]
) -> None:
    """Fails if a product would find no buffer of its precision, or one of other tokens; or if NVLink multicast is
    tried, which fails where a machine does not grant it."""
    with user_buffers(planned(*changes)):
        (asked,) = notes.asked
    assert (asked["shape"], asked["tp_size"]) == ([tokens, 5120], 4)
    assert asked["quantization_modes"] == modes
    assert asked["skips_multicast"] == "1"
    assert asked["dtype"] is torch.bfloat16
    assert notes.asked[1:] == [{}], "given back"


def test_a_run_that_does_not_ask_has_none(notes: Notes) -> None:
    """Fails if every run pays for buffers."""
    with user_buffers(planned("precision.format=fp8_current", overlap=False)):
        pass
    assert notes.asked == []


@pytest.mark.parametrize("overlap", [False, True])
def test_layers_are_told(overlap: bool) -> None:
    """Fails if the option does not reach Megatron-Core's layers, or reaches them unasked."""
    plan = planned("precision.format=fp8_current", overlap=overlap)
    platform = Platform(device=torch.device("cpu"), backend="gloo")
    config = build_transformer_config(plan, operations("torch"), plain_parts(plan, platform))
    assert config.tp_comm_overlap == overlap
