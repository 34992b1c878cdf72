"""Reads the whole weights out of a checkpoint, in one process, without process groups and whatever layout wrote it."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.checkpoint.safe_load import CheckedReader, damage_in
from nemotron_train.model.names import PART_NAMES, rule_for


def read_whole_weights(folder: Path) -> dict[str, Tensor]:
    """Return every parameter by name, packed ones as the mixer holds them on one rank.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or damaged.
    """
    commit = read_commit(folder)
    reader = CheckedReader(folder, commit)
    stored = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is the intent
        try:
            load(stored, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise damage_in(error) or error from error
    weights: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = _packed_name(key)
        if name is None:
            weights[key] = tensor
        elif name not in weights:
            weights[name] = torch.cat([stored[f"{name}.{PART_NAMES[part]}"] for part in rule_for(name).parts])
    return weights


def _packed_name(key: str) -> str | None:
    """The parameter that a stored part belongs to: `….in_proj.weight` for `….in_proj.weight.z`; None for a whole
    parameter."""
    name, _, part = key.rpartition(".")
    return name if part in PART_NAMES.values() and name.endswith(("weight", "bias")) else None
