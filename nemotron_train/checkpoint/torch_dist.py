"""How the state of all ranks becomes files of Megatron-Core's `torch_dist` format, and how it is read from them.

A save has three parts, so that a failing disk cannot leave some ranks waiting for others, and so that the middle one
can run beside training:

1. `plan_files`: all ranks together decide who writes what, and copy it out of the device. No disk is touched.
2. `write_files`: each rank for itself writes, hashes and syncs its files. Nothing is said to other ranks; what goes
   wrong is returned.
3. `write_contents`: one rank, which knows what all others wrote, adds the table of contents.

Megatron-Core's own `save` mixes these: its rank 0 writes `common.pt` before the ranks have agreed on anything.
"""

import io
import json
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from nemotron_train.checkpoint.commit import Commit
from nemotron_train.checkpoint.hashes import HashingWriter, StoredFile, hash_file, write_file
from nemotron_train.checkpoint.safe_load import CONFIG_FILE, METADATA_FILE, CheckedReader, SafePlanner

FILES_PER_RANK = 2  # written side by side


@dataclass(frozen=True)
class PlannedFiles:
    """What this rank will write. The tensors lie in host memory; on a CPU run they may be the model's own."""

    rank: int
    files: dict[str, list[tuple[WriteItem, Any]]]  # tensors and objects by file name
    common: dict[str, Any] | None  # what all ranks share: rank 0 writes it
    contents: Metadata | None  # the table of contents, but for the places: on rank 0
    writer: FileSystemWriterAsync


@dataclass(frozen=True)
class WrittenFiles:
    """What one rank wrote, or why it could not."""

    rank: int
    files: dict[str, StoredFile] = field(default_factory=dict)
    places: list[WriteResult] = field(default_factory=list)
    error: str | None = None


class _PlanOnlyWriter(FileSystemWriterAsync):
    """Plans as Megatron-Core's writer does and leaves the disk, and processes, to `write_files`."""

    planned: dict[str, list[tuple[WriteItem, Any]]]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        buckets = [items for items in _split_by_size_and_type(self.thread_count, plan.items) if items]
        self.planned = {
            f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}": [
                (item, _on_host(planner.resolve_data(item))) for item in items
            ]
            for number, items in enumerate(buckets)
        }


def _on_host(data: Any) -> Any:
    """Take a tensor off the device."""
    return data.detach().to("cpu", non_blocking=True) if isinstance(data, torch.Tensor) else data


def plan_files(
    state: dict[str, Any], content_metadata: dict[str, Any], folder: Path, *, is_first: bool
) -> PlannedFiles:
    """Decide, all ranks together, who writes what of a Megatron-Core sharded state.

    Args:
        is_first: of this process; then Megatron-Core compares all ranks' shards, which are the same in every save.
    """
    sharded, common = save_preprocess({**state, "content_metadata": content_metadata}, is_first)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = _PlanOnlyWriter(str(folder), thread_count=FILES_PER_RANK)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    (_, contents, _), *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(by_key), writer, planner=planner)
    torch.cuda.synchronize()  # copies to the host are done; on a CPU run, nothing to wait for
    rank = dist.get_rank()
    return PlannedFiles(rank, writer.planned, common if rank == 0 else None, contents, writer)


def write_files(planned: PlannedFiles, folder: Path) -> WrittenFiles:
    """Write, hash and sync this rank's files. Never raises: others must hear of a failure, not wait for it."""
    try:
        with ThreadPoolExecutor(FILES_PER_RANK) as pool:
            written = list(pool.map(lambda name: _write_one(folder / name, planned.files[name]), planned.files))
        files = {name: stored for name, (stored, _) in zip(planned.files, written, strict=True)}
        if planned.common is not None:
            files[COMMON_STATE_FNAME] = _write_pickled(folder / COMMON_STATE_FNAME, planned.common)
            config = json.dumps(vars(CheckpointingConfig("torch_dist", 1))).encode()
            files[CONFIG_FILE] = write_file(folder / CONFIG_FILE, [config])
    except Exception as error:
        return WrittenFiles(planned.rank, error=f"{type(error).__name__}: {error}")
    return WrittenFiles(planned.rank, files, [place for _, places in written for place in places])


def _write_one(path: Path, items: Iterable[tuple[WriteItem, Any]]) -> tuple[StoredFile, list[WriteResult]]:
    stream, places = HashingWriter(path), []
    try:
        for item, data in items:
            start = stream.tell()
            if item.type is WriteItemType.BYTE_IO:
                stream.write(data.getbuffer())
            else:
                torch.save(_alone(data), stream)
            length = stream.tell() - start
            places.append(WriteResult(item.index, length, _StorageInfo(path.name, start, length)))
    except BaseException as error:
        stream.abandon()
        raise stream.failure or error from None
    return stream.close(), places


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a view: torch would write all of what it is a view of."""
    is_view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
    return tensor.clone() if is_view else tensor


def _write_pickled(path: Path, value: Any) -> StoredFile:
    content = io.BytesIO()
    torch.save(value, content)
    return write_file(path, [content.getvalue()])


def write_contents(planned: PlannedFiles, everyone: Sequence[WrittenFiles], folder: Path) -> dict[str, StoredFile]:
    """Write the table of contents; returns the files of all ranks, that one included."""
    contents = planned.contents
    assert contents is not None, "the ranks gathered their plans on this rank"
    contents.__dict__.pop("all_local_plans", None)  # only for reusing plans in later saves, which is not done here
    planned.writer.finish(contents, [written.places for written in everyone])
    files = {name: stored for written in everyone for name, stored in written.files.items()}
    files[METADATA_FILE] = hash_file(folder / METADATA_FILE)
    return files


def read_files(
    state: dict[str, Any], folder: Path, commit: Commit, common: dict[str, Any], table: Metadata
) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint, all ranks together.

    Args:
        common, table: `common.pt` and `.metadata`, which every rank has read and checked already.
    """
    return dist_checkpointing.load(
        state, str(folder), sharded_strategy=_CheckedLoad(commit, table), common_strategy=_KnownCommon(common)
    )


class _KnownCommon(TorchCommonLoadStrategy):
    def __init__(self, common: dict[str, Any]) -> None:
        super().__init__()
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return self._common


class _CheckedLoad(TorchDistLoadShardedStrategy):
    """Megatron-Core's loading, with a reader that compares hashes and a planner that runs nothing."""

    def __init__(self, commit: Commit, table: Metadata) -> None:
        super().__init__()
        self._commit, self._table = commit, table

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        tensors = [value for value in _leaves(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, is_loading=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # Megatron-Core's entry point, kept by torch
            torch_checkpoint.load_state_dict(
                state,
                CheckedReader(Path(checkpoint_dir), self._commit, self._table),
                planner=SafePlanner(shapes_validation_sharded_tensors=tensors),
            )
        loaded = _replace_sharded_keys_with_state_dict_keys(
            {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}, flat_mapping, rename_mapping
        )
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


def _leaves(state: Any) -> Iterable[Any]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, list):
        for value in state:
            yield from _leaves(value)
    else:
        yield state
