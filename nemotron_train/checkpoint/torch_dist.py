"""How the state of all ranks becomes files of Megatron-Core's `torch_dist` format, and how it is read from them.

A save has parts, so that a failing disk cannot leave some ranks waiting for others, and so that most of it can run
beside training:

1. `agree_on_plan`: all ranks together decide who writes what. No disk is touched. What they agreed on holds for every
   later state of the same run.
2. `collect_files`: each rank for itself takes what it has to write, off the device where that is a GPU.
3. `write_files`: each rank for itself writes, hashes and syncs its files. Nothing is said to other ranks; what goes
   wrong is returned.
4. `write_contents`: one rank, which knows what all others wrote, adds the table of contents.

Megatron-Core's own `save` mixes these: its rank 0 writes `common.pt` before the ranks have agreed on anything.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
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
class AgreedPlan:
    """Who writes what."""

    rank: int
    files: dict[str, list[WriteItem]]  # of this rank, by name
    contents: Metadata | None  # the table of contents, but for the places: on rank 0


@dataclass(frozen=True)
class CollectedFiles:
    """What this rank will write. On a CPU run the tensors may be the model's own."""

    files: dict[str, list[tuple[WriteItem, Any]]]  # tensors and objects by file name
    common: dict[str, Any] | None  # what all ranks share: rank 0 writes it


@dataclass(frozen=True)
class WrittenFiles:
    """What one rank wrote, or why it could not."""

    rank: int
    files: dict[str, StoredFile] = field(default_factory=dict)
    places: list[WriteResult] = field(default_factory=list)
    error: str | None = None

    def to_report(self) -> bytes:
        """Return what another process takes with `from_report`; large, and slow to take apart."""
        return pickle.dumps(self)

    @staticmethod
    def from_report(report: bytes) -> "WrittenFiles":
        """Take a report of a process of this run; never one from a disk."""
        return pickle.loads(report)


class _PlanOnlyWriter(FileSystemWriterAsync):
    """Plans as Megatron-Core's writer does and leaves the disk, and processes, to `write_files`."""

    planned: dict[str, list[WriteItem]]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        buckets = [items for items in _split_by_size_and_type(self.thread_count, plan.items) if items]
        self.planned = {
            f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}": items for number, items in enumerate(buckets)
        }


def agree_on_plan(state: dict[str, Any]) -> AgreedPlan:
    """Decide, all ranks together, who writes what of a Megatron-Core sharded state; shards that overlap or leave gaps
    are refused."""
    by_key, _ = _prepared(state, validate=True)
    writer = _PlanOnlyWriter("", thread_count=FILES_PER_RANK)
    (_, contents, _), *_ = save_state_dict_async_plan(by_key, writer, planner=_planner())
    if contents is not None:
        contents.__dict__.pop("all_local_plans", None)  # Megatron-Core's way of using plans again
    return AgreedPlan(dist.get_rank(), writer.planned, contents)


def collect_files(state: dict[str, Any], content_metadata: dict[str, Any], agreed: AgreedPlan) -> CollectedFiles:
    """Take what this rank writes out of a state like that which was agreed on. Needs no other rank."""
    by_key, common = _prepared({**state, "content_metadata": content_metadata}, validate=False)
    planner = _planner()
    planner.set_up_planner(by_key, is_coordinator=False)
    files = {
        name: [(item, _on_host(planner.resolve_data(item))) for item in items] for name, items in agreed.files.items()
    }
    torch.cuda.synchronize()  # copies to the host are done; on a CPU run, nothing to wait for
    return CollectedFiles(files, common if agreed.rank == 0 else None)


def _prepared(state: dict[str, Any], *, validate: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the shards of a state as torch's planner takes them, and what all ranks share."""
    sharded, common = save_preprocess(state, validate)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    return mcore_to_pyt_state_dict(by_key), common


def _planner() -> MCoreSavePlanner:
    return MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)


def _on_host(data: Any) -> Any:
    """Take a tensor off the device."""
    return data.detach().to("cpu", non_blocking=True) if isinstance(data, torch.Tensor) else data


def write_files(collect: Callable[[], CollectedFiles], folder: Path, rank: int) -> WrittenFiles:
    """Write, hash and sync this rank's files. Never raises: others must hear of a failure, not wait for it."""
    try:
        mine = collect()
        with ThreadPoolExecutor(FILES_PER_RANK) as pool:
            written = list(pool.map(lambda name: _write_one(folder / name, mine.files[name]), mine.files))
        files = {name: stored for name, (stored, _) in zip(mine.files, written, strict=True)}
        if mine.common is not None:
            files[COMMON_STATE_FNAME] = _write_pickled(folder / COMMON_STATE_FNAME, mine.common)
            config = json.dumps(vars(CheckpointingConfig("torch_dist", 1))).encode()
            files[CONFIG_FILE] = write_file(folder / CONFIG_FILE, [config])
    except Exception as error:
        return WrittenFiles(rank, error=f"{type(error).__name__}: {error}")
    return WrittenFiles(rank, files, [place for _, places in written for place in places])


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


def write_contents(agreed: AgreedPlan, everyone: Sequence[WrittenFiles], folder: Path) -> dict[str, StoredFile]:
    """Write the table of contents; returns the files of all ranks, that one included."""
    assert agreed.contents is not None, "the ranks gathered their plans on this rank"
    writer = FileSystemWriterAsync(str(folder))
    writer.finish(agreed.contents, [written.places for written in everyone])
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
