"""Do checkpoints of Megatron-Core's own hybrid model load here, and ours there?"""

import os
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from nemotron_train.checkpoint.store import load_checkpoint, sharded_state
from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.schema import ModelSection, RunConfig
from nemotron_train.convert.__main__ import main
from tests.convert.megatron_models import MODEL, config_of
from tests.engine.live import live_run
from tests.random_checkpoints import random_checkpoint, save_again
from tests.ranks import RankPool, free_port

TP2_PP2 = {"tensor_parallel_size": 2, "sequence_parallel": True, "pipeline_parallel_size": 2}
KEYS = [f"model.{key}={value!r}" if key == "layer_pattern" else f"model.{key}={value}" for key, value in MODEL.items()]


def megatron(action: str, folder: Path, weights: Path) -> dict[str, Tensor]:
    """Let Megatron-Core's model save or load in a process of its own; returns its weights."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", "-m", "tests.convert.megatron_hybrid", action, str(folder), str(weights)]
    subprocess.run(command, check=True, env=environment)
    return torch.load(weights, weights_only=True)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of Megatron-Core's model, and what is in it."""
    folder = tmp_path_factory.mktemp("megatron") / "iter_0000010"
    folder.mkdir()
    return folder, megatron("save", folder, folder.with_suffix(".pt"))


def test_a_checkpoint_of_megatron_core_is_imported(theirs: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Fails if a parameter has another name, shape or packing there than here."""
    folder, weights = theirs
    assert main(["import-megatron", f"--input={folder}", f"--output={tmp_path / 'run'}", *KEYS]) == 0
    imported = read_whole_weights(tmp_path / "run" / "checkpoints" / "step_000000000")
    assert imported.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(imported[name], weights[name])] == []


def test_a_checkpoint_of_ours_loads_into_megatron_core(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if Megatron-Core's loader cannot read what four ranks wrote, or a weight comes out as another's."""
    first = random_checkpoint(tmp_path / "first", ModelSection(**MODEL))
    saved = ranks.run(save_again, 4, config_of(tmp_path / "ours", parallel=TP2_PP2), first)[0]
    weights, loaded = read_whole_weights(saved), megatron("load", saved, tmp_path / "weights.pt")
    assert loaded.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(loaded[name], weights[name])] == []


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def save_run_with_megatron_core(config: RunConfig, source: Path, folder: Path) -> None:
    """Save a run's weights and moments, and beside them what Megatron-LM adds: an object of its own."""
    with live_run(config) as run:
        load_checkpoint(run, source, lambda commit: None)
        folder.mkdir()
        state = {**sharded_state(run, is_loading=False), "args": Touch(folder / "executed")}
        filesystem_async._results_queue = queue.Queue()  # else a process for it outlives this one
        dist_checkpointing.save(state, str(folder))


def test_moments_are_left_and_nothing_is_executed(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a moment is taken for a weight, or what Megatron-LM pickles beside the weights is loaded."""
    config = config_of(tmp_path / "run")
    source, theirs = random_checkpoint(tmp_path / "alone", config.model), tmp_path / "iter_0000005"
    ranks.run(save_run_with_megatron_core, 1, config, source, theirs)
    assert main(["import-megatron", f"--input={theirs}", f"--output={tmp_path / 'imported'}", *KEYS]) == 0
    imported = read_whole_weights(tmp_path / "imported" / "checkpoints" / "step_000000000")
    expected = read_whole_weights(source)
    assert imported.keys() == expected.keys()
    assert all(torch.equal(imported[name], expected[name]) for name in expected)
    assert not (theirs / "executed").exists()


def test_another_model_or_no_checkpoint_is_refused(
    theirs: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Fails if weights of another shape are taken, a message does not name them, or something is written."""
    folder, _ = theirs
    run = tmp_path / "run"
    for changed, said in (
        ("model.layer_pattern='M-M-'", "it lacks ['decoder.layers.3.mlp.linear_fc1"),
        ("model.ffn_hidden_size=128", "has the shape (64, 32); the command line says (128, 32)"),
        ("train.seq_length=64", "not train.seq_length=64"),
    ):
        assert main(["import-megatron", f"--input={folder}", f"--output={run}", *KEYS, changed]) == 1
        assert said in capsys.readouterr().err
    assert main(["import-megatron", f"--input={tmp_path}", f"--output={run}", *KEYS]) == 1
    assert ".metadata is missing" in capsys.readouterr().err
    assert not run.exists()
