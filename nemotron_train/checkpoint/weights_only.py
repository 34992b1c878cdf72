"""Writes a checkpoint that holds weights and no optimizer state, from any source and one layer at a time.

It is what imported and merged models start from: a run on any layout loads it as any other checkpoint and begins with
fresh moments; master weights are the stored weights. It needs no process group, and memory for one layer.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.futures import Future

from nemotron_train.checkpoint.commit import Commit, commit_folder, start_folder
from nemotron_train.checkpoint.resume_gate import model_facts
from nemotron_train.checkpoint.stored_weights import parameter_of
from nemotron_train.config.schema import ModelSection
from nemotron_train.errors import CheckpointError
from nemotron_train.model.names import PART_NAMES, part_rows, rule_for

ORIGIN_FILE = "weights_only.json"  # its presence says that there is no optimizer state
# What a commit says where nothing was configured and nothing consumed.
_NOTHING = "none"


def holds_only_weights(commit: Commit) -> bool:
    return ORIGIN_FILE in commit.files


def write_weights_only(
    checkpoints: Path,
    model: ModelSection,
    contents: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    made_from: Mapping[str, object],
) -> Path:
    """Write `checkpoints/step_000000000`.

    Args:
        contents: shape and dtype of every parameter by name, as tensors on the meta device.
        read: returns the values of one of them.
        made_from: what to write down about the origin.

    Raises:
        CheckpointError: the checkpoint is there already, or cannot be written; nothing half written stays.
    """
    folder = start_folder(checkpoints, 0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is the intent
            writer = _LayerFiles(folder, sync_files=False)  # commit_folder does
            save(_meta_parts(contents, model), storage_writer=writer, planner=_Reader(model, read), no_dist=True)
        torch.save({}, folder / "common.pt")  # Megatron-Core's file for what is no tensor
        save_config(CheckpointingConfig("torch_dist"), str(folder))
        (folder / ORIGIN_FILE).write_text(json.dumps(dict(made_from), indent=1), encoding="utf-8")
        return commit_folder(
            folder,
            step=0,
            consumed_tokens=0,
            skipped_steps=0,
            origin=None,
            model=model_facts(model),
            config_fingerprint=_NOTHING,
            data_hash=_NOTHING,
            layout={},
            versions={name: version(name) for name in ("torch", "megatron-core", "numpy")},
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"Cannot write {folder}: {error}. Check the free space.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # it has another name if all went well


def _parts(name: str, tensor: Tensor, model: ModelSection) -> dict[str, Tensor]:
    """What a parameter is stored as: packed rows in parts, as Megatron-Core does, for any tensor-parallel size."""
    letters = rule_for(name).parts
    if not letters:
        return {name: tensor}
    rows = tensor.split(part_rows(letters, model))
    return {f"{name}.{PART_NAMES[letter]}": part for letter, part in zip(letters, rows, strict=True)}


def _meta_parts(contents: Mapping[str, Tensor], model: ModelSection) -> dict[str, Any]:
    return {key: part for name, tensor in contents.items() for key, part in _parts(name, tensor, model).items()}


class _LayerFiles(FileSystemWriter):
    """Writes a file for each layer: torch's writer keeps what it writes into one file until that is closed."""

    def write_data(self, plan: Any, planner: Any) -> Future:
        results = []
        for number, (_, items) in enumerate(groupby(plan.items, lambda item: _layer_of(item.index.fqn))):
            prefix = replace(plan.storage_data, prefix=f"__{number}_")
            results += super().write_data(replace(plan, items=list(items), storage_data=prefix), planner).value()
        written: Future = Future()
        written.set_result(results)
        return written


def _layer_of(key: str) -> str:
    """`decoder.layers.3` for what belongs to that layer, else the key itself."""
    return ".".join(key.split(".")[:3]) if key.startswith("decoder.layers.") else key


class _Reader(DefaultSavePlanner):
    """Plans with tensors on the meta device and fetches values only when they are written."""

    def __init__(self, model: ModelSection, read: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._model, self._read = model, read
        self._now: dict[str, Tensor] = {}

    def resolve_data(self, write_item: Any) -> Tensor:
        key = write_item.index.fqn
        if key not in self._now:
            self._now = {}  # one parameter at a time is in memory
            name = parameter_of(key)
            self._now = _parts(name, self._read(name), self._model)
        return self._now[key]
