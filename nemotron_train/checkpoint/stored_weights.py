"""Reads the weights of a checkpoint one parameter at a time, in one process and whatever layout wrote it.

`whole_weights.py` reads all of them at once; this is also for models that do not fit into memory.
"""

import re
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemotron_train.checkpoint.commit import COMMIT_FILE, read_commit
from nemotron_train.checkpoint.safe_load import CheckedReader, damage_in, reason_in
from nemotron_train.errors import CheckpointError
from nemotron_train.model.names import PART_NAMES, rule_for

_OF_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # Megatron-Core has the prefix where there are several
# torch's CheckpointException is a BaseException: left to itself it would pass every `except Exception`.
_READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, CheckpointException)


class StoredWeights:
    """The parameters of one complete checkpoint, packed ones as the mixer holds them on one rank."""

    def __init__(self, folder: Path, *, is_committed: bool = True) -> None:
        """Read the checkpoint's table of contents.

        Args:
            is_committed: False for one that Megatron-Core wrote by itself: there are no hashes to compare then.

        Raises:
            CheckpointError: the folder is no checkpoint, or lacks a part of a packed parameter.
        """
        commit = read_commit(folder) if is_committed else None
        self.folder = folder
        try:
            self._reader = CheckedReader(folder, commit)
        except OSError as error:
            raise CheckpointError(f"Cannot read {folder}: {error}") from error
        self._entries = {
            key: entry
            for key, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _OF_OPTIMIZER.match(key)
        }
        self._keys = {name: _stored_under(name) for name in dict.fromkeys(map(parameter_of, self._entries))}
        lacking = sorted({key for keys in self._keys.values() for key in keys} - self._entries.keys())
        if lacking:
            raise CheckpointError(f"{folder} lacks parts of parameters: {lacking[:3]} ({len(lacking)} in all).")

    @property
    def names(self) -> list[str]:
        return list(self._keys)

    def check_names(self, expected: set[str], described_by: str = COMMIT_FILE) -> None:
        """Raise CheckpointError unless the parameters are just those of the model that is described."""
        lacking, left_over = sorted(expected - self._keys.keys()), sorted(self._keys.keys() - expected)
        if lacking or left_over:
            raise CheckpointError(
                f"{self.folder} does not hold the model that {described_by} describes: it lacks {lacking[:3]} "
                f"({len(lacking)} in all) and has {left_over[:3]} ({len(left_over)} in all) besides."
            )

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], described_by: str = COMMIT_FILE) -> None:
        """Raise CheckpointError at the first parameter that has another shape than in the model that is described."""
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise CheckpointError(
                    f"{name} in {self.folder} has the shape {self.shape(name)}; {described_by} says {shape}."
                )

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[self._keys[name][0]].properties.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        sizes = [self._entries[key].size for key in self._keys[name]]
        return (sum(size[0] for size in sizes), *sizes[0][1:])

    def num_elements(self, name: str) -> int:
        return prod(self.shape(name))

    def num_bytes(self, name: str) -> int:
        return self.num_elements(name) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """Return one parameter.

        Raises:
            CheckpointError: its files are damaged.
        """
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        keys = self._keys[name]
        # Parts are read into their rows of the whole: it exists once, and beside it what was read of one file.
        rows = whole.split([self._entries[key].size[0] for key in keys]) if len(keys) > 1 else [whole]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is the intent
            try:
                load(dict(zip(keys, rows, strict=True)), storage_reader=self._reader, no_dist=True)
            except _READ_ERRORS as error:
                failed = CheckpointError(f"Cannot read {name} from {self.folder}: {reason_in(error)}")
                raise damage_in(error) or failed from error
        return whole


def parameter_of(key: str) -> str:
    """The parameter that a key holds, or a part of: `….in_proj.weight` for `….in_proj.weight.z`."""
    name, _, part = key.rpartition(".")
    return name if part in PART_NAMES.values() and name.endswith(("weight", "bias")) else key


def _stored_under(name: str) -> list[str]:
    """The keys a parameter is stored under: its name, or one for each packed part."""
    parts = rule_for(name).parts
    return [f"{name}.{PART_NAMES[part]}" for part in parts] if parts else [name]
