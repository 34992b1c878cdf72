"""How is a checkpoint read without running what is in it?

Four places of Megatron-Core's `torch_dist` format are pickles, and a pickle is a program: `common.pt`, each tensor and
each object in a `.distcp` file, and the table of contents `.metadata`. torch reads tensors with `weights_only`; the
other three it would execute. Here each is read by an unpickler that knows a short list of classes and calls nothing
else; anything beyond that is refused, and the file is named.

A file is also compared with its hash in `COMMIT.json`, by the rank that reads it, before it is used.
"""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, Metadata, ReadItem
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.futures import Future

from nemotron_train.checkpoint.commit import Commit, DamagedCheckpoint, check_file
from nemotron_train.precision.delayed_scaling import Unread

METADATA_FILE = ".metadata"
CONFIG_FILE = "metadata.json"
_BAD_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    TypeError,
    ValueError,
    KeyError,
)

# What torch and Megatron-Core put into `.metadata`: plain records of names, places and shapes.
_TABLE_OF_CONTENTS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "Path", "PurePosixPath"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"dict", "list", "set", "tuple", "getattr"},  # getattr: replaced by `_member`
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}  # fmt: skip
# What Transformer Engine keeps for a layer with delayed scaling: its recipe, numbers, and small tensors.
_FP8_STATE = {
    "transformer_engine.common.recipe": {"DelayedScaling", "Format", "_FormatHelper", "MMParams", "QParams"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"_load_from_bytes"},  # replaced: the bytes are another pickle
    "collections": {"OrderedDict"},
    "builtins": {"dict", "list", "set", "tuple", "getattr"},
}


class _ListedClasses(pickle.Unpickler):
    """Makes only what is on a list."""

    def __init__(self, file: Any, listed: dict[str, set[str]]) -> None:
        super().__init__(file)
        self._listed = listed

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if name not in self._listed.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _tensor_storage
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module.startswith("transformer_engine."):
            return Unread  # looked into, not used; a machine without a GPU does not have the class
        return super().find_class(module, name)


def _tensor_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def _member(owner: Any, name: str) -> Any:
    """Stands in for `getattr`, which pickle uses for members of an enum."""
    if owner is Unread:
        return Unread()
    members = getattr(owner, "__members__", {}) if isinstance(owner, type) else {}
    if name not in members:
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of {owner!r}")
    return members[name]


def read_table_of_contents(folder: Path, commit: Commit | None = None) -> Metadata:
    """Read `.metadata`: which tensors there are, and where in which file.

    Args:
        commit: its hashes are compared; without it, the caller has done so.

    Raises:
        DamagedCheckpoint: the file was altered, or is a pickle of something else.
    """
    path = folder / METADATA_FILE
    if commit is not None:
        check_file(folder, METADATA_FILE, commit)
    try:
        with open(path, "rb") as file:
            table = _ListedClasses(file, _TABLE_OF_CONTENTS).load()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing.") from error
    except _BAD_PICKLE as error:
        raise DamagedCheckpoint(f"{path} is refused: {error}.") from error
    if not isinstance(table, Metadata):
        raise DamagedCheckpoint(f"{path} is refused: it holds {type(table).__name__}, not a table of contents.")
    if table.storage_meta is None:
        table.storage_meta = StorageMeta()
    return table


def read_common(folder: Path, commit: Commit) -> dict[str, Any]:
    """Read `common.pt`: what all ranks share.

    Raises:
        DamagedCheckpoint: the file was altered, or asks for more than tensors and plain values.
    """
    check_file(folder, COMMON_STATE_FNAME, commit)
    try:
        return torch.load(folder / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)
    except (*_BAD_PICKLE, RuntimeError) as error:
        raise DamagedCheckpoint(f"{folder / COMMON_STATE_FNAME} is refused: {_first_line(error)}") from error


def check_fp8_state(name: str, state: Any) -> None:
    """Make sure that what Transformer Engine will unpickle for a layer asks for nothing but FP8 state.

    Raises:
        DamagedCheckpoint: it does.
    """
    if isinstance(state, torch.Tensor):
        content = state.detach().cpu().numpy().tobytes()
    elif isinstance(state, io.BytesIO):
        content = state.getvalue()
    elif state is None:
        return
    else:
        raise DamagedCheckpoint(f"The FP8 state {name} is refused: it is a {type(state).__name__}.")
    if not content:
        return
    try:
        _ListedClasses(io.BytesIO(content), _FP8_STATE).load()
    except (*_BAD_PICKLE, RuntimeError) as error:
        raise DamagedCheckpoint(f"The FP8 state {name} is refused: {_first_line(error)}.") from error


class CheckedReader(FileSystemReader):
    """Reads tensors out of a checkpoint's files, each compared with its hash before it is first used.

    With `commit=None` hashes are not compared, for tools that read a checkpoint piece by piece.
    """

    def __init__(self, folder: Path, commit: Commit | None, table: Metadata | None = None) -> None:
        super().__init__(os.fspath(folder))
        self._folder, self._commit = folder, commit
        self._table = table if table is not None else read_table_of_contents(folder, commit)
        self._checked: set[str] = set()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._table

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        names = {self.storage_data[item.storage_index].relative_path for item in plan.items}
        for name in sorted(names - self._checked):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise DamagedCheckpoint(f"{self._folder / METADATA_FILE} points to {name}, outside of the checkpoint.")
            if self._commit is not None:
                check_file(self._folder, name, self._commit)
            self._checked.add(name)
        return super().read_data(plan, planner)


class SafePlanner(MCoreLoadPlanner):
    """Megatron-Core's planner; objects between the tensors are read as tensors and plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            found = torch.load(value, map_location="cpu", weights_only=True)
        except (*_BAD_PICKLE, RuntimeError) as error:
            raise DamagedCheckpoint(f"The object {name} is refused: {_first_line(error)}") from error
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], found)
        else:
            self.state_dict[name] = found


def damage_in(error: BaseException) -> DamagedCheckpoint | None:
    """Return the damage that ranks found while they read, if that is what stopped them."""
    damages = [str(failure) for failure in _failures_in(error) if isinstance(failure, DamagedCheckpoint)]
    return DamagedCheckpoint("\n".join(dict.fromkeys(damages))) if damages else None


def reason_in(error: BaseException) -> str:
    """Say in a line what stopped ranks while they read. The text as it is would be a traceback of each, and
    Megatron-Core names all keys of a checkpoint that lacks one."""
    reasons = [f"{type(failure).__name__}: {_first_line(failure)}"[:300] for failure in _failures_in(error)]
    return "; ".join(dict.fromkeys(reasons))


def _failures_in(error: BaseException) -> list[BaseException]:
    """What went wrong on each rank: torch gathers that into an exception of its own."""
    return [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]


def _first_line(error: BaseException) -> str:
    """torch adds a page of advice on how to load it all the same."""
    return (str(error).splitlines() or [type(error).__name__])[0]
