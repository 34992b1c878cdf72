"""Does a checkpoint that Megatron-Core wrote by itself become one to train from, bit by bit?"""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from nemotron_train.checkpoint.store import load_checkpoint, sharded_state
from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.schema import RunConfig
from nemotron_train.convert.__main__ import main
from nemotron_train.engine.optimizer import allocate_state
from tests.engine.live import live_run
from tests.random_checkpoints import random_checkpoint
from tests.ranks import RankPool
from tests.small_runs import small_config

MODEL = {"layer_pattern": "M*-", "hidden_size": 32}


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def save_with_megatron_core(config: RunConfig, source: Path, folder: Path) -> None:
    """Save a run's weights and moments, and beside them what Megatron-LM adds: an object of its own."""
    with live_run(config) as run:
        load_checkpoint(run, source, lambda commit: None)
        allocate_state(run.optimizer)
        folder.mkdir()
        state = {**sharded_state(run, is_loading=False), "args": Touch(folder / "executed")}
        dist_checkpointing.save(state, str(folder))


@pytest.fixture(scope="module")
def source_and_theirs(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, Path]:
    folder = tmp_path_factory.mktemp("mcore")
    config = small_config(folder, folder / "run", model=MODEL)
    source = random_checkpoint(folder / "alone", config.model)
    ranks.run(save_with_megatron_core, 1, config, source, folder / "iter_0000005")
    return config, source, folder / "iter_0000005"


def import_mcore(config: RunConfig, theirs: Path, run_dir: Path, **others: object) -> int:
    keys = vars(config.model) | others
    overrides = [
        f"model.{key}='{value}'" if isinstance(value, str) and key == "layer_pattern" else f"model.{key}={value}"
        for key, value in keys.items()
        if isinstance(value, (int, float)) or key == "layer_pattern"
    ]
    small = ["experiment=quickstart", *overrides]
    return main(["import-mcore", f"--input={theirs}", f"--output={run_dir}", *small])


def test_weights_are_taken_bitwise_and_nothing_is_executed(
    source_and_theirs: tuple[RunConfig, Path, Path], tmp_path: Path
) -> None:
    """Fails if a weight is lost, another's or a moment's, or what Megatron-LM pickles beside them is loaded."""
    config, source, theirs = source_and_theirs
    assert import_mcore(config, theirs, tmp_path / "run") == 0
    imported = read_whole_weights(tmp_path / "run" / "checkpoints" / "step_000000000")
    expected = read_whole_weights(source)
    assert imported.keys() == expected.keys()
    assert all(torch.equal(imported[name], expected[name]) for name in expected)
    assert not (theirs / "executed").exists()


def test_another_model_or_no_checkpoint_is_refused(
    source_and_theirs: tuple[RunConfig, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Fails if weights of another shape are taken, a message does not say both, or something is written."""
    config, _, theirs = source_and_theirs
    assert import_mcore(config, theirs, tmp_path / "run", ffn_hidden_size=128) == 1
    assert "has the shape (64, 32); the command line says (128, 32)" in capsys.readouterr().err
    assert import_mcore(config, theirs, tmp_path / "run", layer_pattern="M*-M") == 1
    assert "it lacks ['decoder.layers.3." in capsys.readouterr().err
    assert import_mcore(config, tmp_path, tmp_path / "run") == 1
    assert ".metadata is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
