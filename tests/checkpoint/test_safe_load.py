"""Loading a checkpoint runs nothing that is in it, even if its hashes fit."""

import io
import pickle
import queue
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nemotron_train.checkpoint.commit import COMMIT_FILE, DamagedCheckpoint, commit_folder, parse_commit, step_folder
from nemotron_train.checkpoint.safe_load import SafePlanner, check_fp8_state, read_table_of_contents
from nemotron_train.checkpoint.store import sharded_state
from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.run_data import open_run_data
from nemotron_train.errors import CheckpointError
from nemotron_train.precision.delayed_scaling import DelayedScales
from nemotron_train.precision.fp8_reference import Fp8Format
from tests.checkpoint.saved_runs import save_steps, tiny_config, trainer_of
from tests.engine.live import live_run
from tests.ranks import RankPool


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Call:
    """A pickle that calls something with arguments."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def forge(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint and commit it anew, as somebody who may write there can."""
    facts = vars(parse_commit(folder)) | {"files": None}
    (folder / COMMIT_FILE).unlink()
    (folder / name).write_bytes(content)
    temporary = folder.rename(folder.with_suffix(".tmp-forged"))
    commit_folder(temporary, **facts)


def torch_saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def forge_and_load(config: RunConfig) -> list[str]:
    """Forge each file of the only checkpoint in turn; returns what resuming says, and what was executed."""
    run_dir = Path(config.run.dir)
    mark, said = run_dir / "executed", []
    checkpoints = run_dir / "checkpoints"
    with live_run(config) as run:
        data = open_run_data(config)
        for name, content in (
            (".metadata", pickle.dumps(Touch(mark))),
            ("common.pt", torch_saved({"optimizer": Touch(mark)})),
            ("__0_0.distcp", torch_saved(Touch(mark)) * 8),
        ):
            save_steps(run, data, [1])
            folder = step_folder(checkpoints, 1)
            forge(folder, name, content)
            try:
                trainer_of(run, data).resume()
            except CheckpointError as error:
                said.append(f"{name} executed={mark.exists()}: {error}")
            else:
                said.append(f"{name}: loaded")
            for left in checkpoints.iterdir():
                left.rename(run_dir / f"{name}.{left.name}")
    return said


def test_a_crafted_file_is_refused_and_named(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a pickle in any file of a checkpoint is executed, or the message leaves open which file it was."""
    table, common, payload = ranks.run(forge_and_load, 1, tiny_config(corpus, tmp_path))[0]
    assert ".metadata executed=False" in table
    assert ".metadata is refused: it asks for pathlib.Path.touch" in table
    assert "common.pt executed=False" in common
    assert "common.pt is refused" in common
    assert "executed=False" in payload


@pytest.mark.parametrize(
    "crafted",
    [
        lambda mark: Touch(mark),
        lambda mark: Call(getattr, Path, "touch"),
        lambda mark: Call(eval, "1"),
        lambda mark: Call(torch.load, str(mark)),
        lambda mark: Call(pickle.loads, pickle.dumps(Touch(mark))),
        lambda mark: Call(torch.storage._load_from_bytes, torch_saved(Touch(mark))),
        lambda mark: {"not": "a table of contents"},
    ],
)
def test_a_table_of_contents_is_nothing_else(tmp_path: Path, crafted: Callable) -> None:
    """Fails if `.metadata` can reach any function, `getattr` included, or hold another object."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(crafted(tmp_path / "executed")))
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is refused"):
        read_table_of_contents(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_list_of_classes_lets_megatron_cores_own_tables_through(
    ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """Fails if a checkpoint that Megatron-Core's own `save` wrote, with its plans in the table, is refused."""
    ranks.run(save_with_megatron_core, 1, tiny_config(corpus, tmp_path))
    assert hasattr(read_table_of_contents(tmp_path / "theirs"), "all_local_plans")
    temporary = (tmp_path / "theirs").rename(tmp_path / "step.tmp-x")
    facts = vars(parse_commit(step_folder(tmp_path / "checkpoints", 1))) | {"files": None, "step": 2}
    assert read_whole_weights(commit_folder(temporary, **facts))["decoder.final_norm.weight"].eq(1.0).all()


def save_with_megatron_core(config: RunConfig) -> None:
    with live_run(config) as run:
        save_steps(run, open_run_data(config), [1])
        theirs = Path(config.run.dir) / "theirs"
        theirs.mkdir()
        filesystem_async._results_queue = queue.Queue()  # else a process for it outlives this one
        dist_checkpointing.save(sharded_state(run, is_loading=False), str(theirs))


def test_objects_between_tensors_are_plain_values(tmp_path: Path) -> None:
    """Fails if an object that lies beside the tensors, as FP8 state does, is unpickled freely, or a plain one is
    refused."""

    class Item:
        class dest_index:
            fqn = "decoder.layers.0.mlp.linear_fc1._extra_state"

    planner = SafePlanner(flatten_state_dict=False)
    planner.state_dict = {}
    planner.load_bytes(Item(), io.BytesIO(torch_saved([torch.ones(3, dtype=torch.uint8)])))
    assert planner.state_dict[Item.dest_index.fqn][0].tolist() == [1, 1, 1]
    with pytest.raises(DamagedCheckpoint, match=r"linear_fc1\._extra_state is refused"):
        planner.load_bytes(Item(), io.BytesIO(torch_saved([Touch(tmp_path / "executed")])))
    assert not (tmp_path / "executed").exists()


def bytes_tensor(value: Any) -> torch.Tensor:
    """How Transformer Engine stores the state of a layer."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def test_fp8_state_is_looked_into_before_transformer_engine_unpickles_it(tmp_path: Path) -> None:
    """Fails if a crafted FP8 state reaches Transformer Engine, directly or inside a tensor, or a real one does not."""
    real = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(16, 3), "extra_fp8_variables": {"a": 1}}
    check_fp8_state("layer", bytes_tensor(real))
    check_fp8_state("layer", torch.empty(0, dtype=torch.uint8))
    mark = tmp_path / "executed"
    for crafted in (
        Touch(mark),
        {"scale_fwd": Call(torch.storage._load_from_bytes, torch_saved(Touch(mark)))},
    ):
        with pytest.raises(DamagedCheckpoint, match="FP8 state layer is refused"):
            check_fp8_state("layer", bytes_tensor(crafted))
    assert not mark.exists()


class Format(Enum):
    """Stands in, as the next class does, for one of Transformer Engine's that its layers pickle."""

    HYBRID = ("e4m3", "e5m2")


@dataclass
class DelayedScaling:
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024


def test_fp8_state_is_looked_into_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a checkpoint of delayed scaling, whose state names classes of Transformer Engine, is called damaged on a
    machine without it, or cannot be taken over there, or if one of its classes that holds no state is let through."""
    library = types.ModuleType("transformer_engine.common.recipe")
    library.Format, library.DelayedScaling = Format, DelayedScaling
    with monkeypatch.context() as patch:
        for name in ("transformer_engine", "transformer_engine.common"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, library.__name__, library)
        for known in (Format, DelayedScaling):
            patch.setattr(known, "__module__", library.__name__)
        numbers = pickle.loads(bytes(DelayedScales(Fp8Format.e5m2).to_bytes().tolist()))
        # Some versions of Python pickle the member of an enum by name.
        named = Call(getattr, Format, "HYBRID")
        written = bytes_tensor(
            {"recipe": DelayedScaling(), "member": named, **numbers, "scale_fwd": torch.full((3,), 7.0)}
        )
    assert b"transformer_engine" in bytes(written.tolist())
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    check_fp8_state("layer", written)
    scales = DelayedScales(Fp8Format.e5m2)
    scales.from_bytes(written)
    assert scales.forward.scale_Q.tolist() == [7.0] * 3
    other = bytes(written.tolist()).replace(b"DelayedScaling", b"DelayedTouches")
    with pytest.raises(DamagedCheckpoint, match="DelayedTouches"):
        check_fp8_state("layer", torch.frombuffer(bytearray(other), dtype=torch.uint8))
