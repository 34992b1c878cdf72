"""Reads the weights of a checkpoint one parameter at a time, in one process and whatever layout wrote it.

`checkpoint.whole_weights` reads all of them at once; this is for models that do not fit into memory.
"""

import warnings
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.errors import CheckpointError
from nemotron_train.model.names import PART_NAMES, rule_for

# torch's CheckpointException is a BaseException: left to itself it would pass every `except Exception`.
_READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, CheckpointException)


class StoredWeights:
    """The parameters of one complete checkpoint; every one of `names` is there, and no other."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Read the checkpoint's table of contents.

        Raises:
            CheckpointError: the folder is no complete checkpoint, or holds other parameters than `names`.
        """
        read_commit(folder)
        self._folder = folder
        try:
            self._reader = _IndexedReader(folder)
        except _READ_ERRORS as error:
            raise CheckpointError(f"Cannot read {folder}: {error}") from error
        self._entries = {
            key: entry
            for key, entry in self._reader.contents.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self._keys = {name: self._stored_under(name) for name in names}
        wanted = {key for keys in self._keys.values() for key in keys}
        lacking, left_over = sorted(wanted - self._entries.keys()), sorted(self._entries.keys() - wanted)
        if lacking or left_over:
            raise CheckpointError(
                f"{folder} does not hold the model that its COMMIT.json describes: it lacks {lacking[:3]} "
                f"({len(lacking)} in all) and has {left_over[:3]} ({len(left_over)} in all) besides."
            )

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[self._keys[name][0]].properties.dtype

    def num_elements(self, name: str) -> int:
        return sum(prod(self._entries[key].size) for key in self._keys[name])

    def num_bytes(self, name: str) -> int:
        return self.num_elements(name) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """Return one parameter, a packed one as the mixer holds it on one rank.

        Raises:
            CheckpointError: its files are damaged.
        """
        entries = {key: self._entries[key] for key in self._keys[name]}
        stored = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is the intent
            try:
                load(stored, storage_reader=self._reader, no_dist=True)
            except _READ_ERRORS as error:
                raise CheckpointError(f"Cannot read {name} from {self._folder}: {error}") from error
        parts = list(stored.values())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stored_under(self, name: str) -> list[str]:
        """The keys a parameter is stored under: its name, or one for each packed part."""
        parts = rule_for(name).parts
        return [f"{name}.{PART_NAMES[part]}" for part in parts] if parts and name not in self._entries else [name]


class _IndexedReader(FileSystemReader):
    """Reads the table of contents once; torch would read it, all optimizer state listed, for every tensor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.contents: Metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.contents
