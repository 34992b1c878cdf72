"""Does `train.deterministic` reach what reads it, and nothing else?"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.engine.mcore_config import build_transformer_config
from nemotron_train.ops.implementations import operations
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.determinism import VARIABLES, set_determinism
from nemotron_train.platform.device import Platform
from tests.plan.small import config_with
from tests.small_runs_by_command import small_overrides

CPU = Platform(device=torch.device("cpu"), backend="gloo")


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment, and settings of torch, that a test may change."""
    monkeypatch.setattr(os, "environ", {name: "the user's" for name in VARIABLES})
    yield
    torch.use_deterministic_algorithms(False)


def test_what_libraries_read_is_set(untouched: None) -> None:
    """Fails if a variable is left to the user, or torch's own sums stay as they come."""
    set_determinism(True)
    assert {name: os.environ[name] for name in VARIABLES} == VARIABLES
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_run_that_does_not_ask_changes_nothing(untouched: None) -> None:
    """Fails if a run that does not ask pays for it, also after one in the same process that did."""
    set_determinism(True)
    os.environ.update(dict.fromkeys(VARIABLES, "the user's"))
    set_determinism(False)
    assert {os.environ[name] for name in VARIABLES} == {"the user's"}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("asked", [True, False])
def test_megatron_core_is_told(asked: bool) -> None:
    """Fails if the embedding's gradient on a GPU is added up in any order."""
    plan = plan_run(config_with(f"train.deterministic={asked}"), 1)
    config = build_transformer_config(plan, operations("torch"), choose_layer_parts(plan, CPU))
    assert config.deterministic_mode is asked


def test_the_front_door_sets_it_before_ranks_meet(corpus: Path, tmp_path: Path) -> None:
    """Fails if `train` forgets it, or does it when libraries have read their variables already."""
    program = (
        "import os, sys; from nemotron_train import train\n"
        "def meet(*a, **k): sys.exit(' '.join(f'{n}={os.environ.get(n)}' for n in sys.argv[2:]))\n"
        "train.process_groups = meet\n"
        "train.run(sys.argv[1].split('\\n'), train.LaunchedRank(0, 1, 0))\n"
    )
    overrides = [*small_overrides(corpus, tmp_path / "run", steps=20), "train.deterministic=true"]
    command = [sys.executable, "-c", program, "\n".join(overrides), *VARIABLES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == " ".join(f"{name}={value}" for name, value in VARIABLES.items())
