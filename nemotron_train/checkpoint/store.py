"""Saves and loads the state of a run, all ranks together, under any layout: `torch_dist` files inside a commit."""

import gc
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from nemotron_train.checkpoint.commit import (
    Commit,
    check_file,
    commit_folder,
    read_commit,
    start_folder,
)
from nemotron_train.checkpoint.fp8_weights import loaded_as_plain, stored_from_masters, take_as_masters
from nemotron_train.checkpoint.optimizer_shards import write_own_shards
from nemotron_train.checkpoint.resume import checkpoints_folder
from nemotron_train.checkpoint.resume_gate import model_facts
from nemotron_train.checkpoint.safe_load import (
    CONFIG_FILE,
    check_fp8_state,
    damage_in,
    read_common,
    read_table_of_contents,
    reason_in,
)
from nemotron_train.checkpoint.torch_dist import (
    AgreedPlan,
    CollectedFiles,
    WrittenFiles,
    agree_on_plan,
    collect_files,
    read_files,
    write_contents,
    write_files,
)
from nemotron_train.checkpoint.weights_only import holds_only_weights
from nemotron_train.config.keys import plain
from nemotron_train.config.load import fingerprint
from nemotron_train.engine.agreement import from_rank_zero, on_all_ranks
from nemotron_train.engine.optimizer import allocate_state, load_state
from nemotron_train.engine.wrap import weights_complete
from nemotron_train.errors import CheckpointError
from nemotron_train.plan.run_plan import RunPlan
from nemotron_train.runtime import Progress, Runtime

# torch's CheckpointException is a BaseException: left to itself it would pass every `except Exception`.
_LOAD_ERRORS = (OSError, RuntimeError, CheckpointingException, CheckpointException, ValueError, KeyError)

_FP8_STATE = "_extra_state"  # PyTorch's name for what a module keeps beside tensors; stored under delayed scaling only


@dataclass(frozen=True)
class StartedSave:
    """A checkpoint that every rank knows its part of, and that nobody has written yet."""

    folder: Path
    agreed: AgreedPlan
    collect: Callable[[], CollectedFiles]
    facts: dict[str, Any]  # of the commit
    step: int

    def write(self) -> WrittenFiles:
        """Write this rank's part. Needs no other rank; never raises."""
        return write_files(self.collect, self.folder, self.agreed.rank)


def save_checkpoint(run: Runtime, progress: Progress, data_hash: str, data_past: dict[str, Any] | None = None) -> Path:
    """Write one checkpoint under the run folder, all ranks together, and commit it.

    `data_hash` and `data_past` are those of `start_save`.

    Raises:
        CheckpointError: on every rank, when any of them could not write; the temporary folder is gone then.
    """
    started = start_save(run, progress, data_hash, data_past)
    return finish_save(started, started.write())


def start_save(
    run: Runtime,
    progress: Progress,
    data_hash: str,
    data_past: dict[str, Any] | None = None,
    agreed: AgreedPlan | None = None,
) -> StartedSave:
    """Make the folder and decide who writes what; training must not go on before `write`, or a fork for it.

    Args:
        data_hash: of everything that decided the samples up to now (`BlendPlan.past_hash`).
        data_past: that itself (`BlendPlan.past`), for people.
        agreed: who wrote what in an earlier save of this run, which is the same in every save.

    Raises:
        CheckpointError: on every rank, when the folder cannot be made.
    """
    config = run.plan.config
    folder = from_rank_zero(lambda: start_folder(checkpoints_folder(config), progress.step))
    with weights_complete(run.chunks):
        agreed = agreed or agree_on_plan(sharded_state(run, is_loading=False))
    collect: Callable[[], CollectedFiles] = partial(_collect, run, agreed)
    if run.platform.is_cuda:  # a forked process cannot use the GPU
        copied = collect()
        collect = lambda: copied  # noqa: E731
    facts = dict(
        **asdict(progress),
        model=model_facts(config.model),
        config=plain(config),
        config_fingerprint=fingerprint(config),
        data_hash=data_hash,
        data_past=data_past or {},
        layout=asdict(run.plan.layout),
        versions={name: version(name) for name in ("torch", "megatron-core", "numpy")},
    )
    return StartedSave(folder, agreed, collect, facts, progress.step)


def _collect(run: Runtime, agreed: AgreedPlan) -> CollectedFiles:
    return collect_files(sharded_state(run, is_loading=False), _stored_metadata(), agreed)


def finish_save(started: StartedSave, written: WrittenFiles) -> Path:
    """Commit what all ranks wrote.

    Raises:
        CheckpointError: on every rank, when any of them could not write; the temporary folder is gone then.
    """
    reports = gather_reports(written.to_report())
    return from_rank_zero(lambda: commit_save(started, reports))


def gather_reports(report: bytes) -> list[bytes]:
    """Tell rank 0 what all ranks wrote; returns nothing on the others."""
    reports: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(report, reports)
    return reports or []


def commit_save(started: StartedSave, reports: Sequence[bytes]) -> Path:
    """Finish a checkpoint on rank 0, from what all ranks wrote; needs no other rank.

    Raises:
        CheckpointError: a rank, or this one now, could not write; the temporary folder is gone then.
    """
    folder, everyone = started.folder, [WrittenFiles.from_report(report) for report in reports]
    try:
        errors = [f"rank {written.rank}: {written.error}" for written in everyone if written.error]
        if errors:
            raise CheckpointError("; ".join(errors))
        return commit_folder(folder, write_contents(started.agreed, everyone, folder), **started.facts)
    except (OSError, CheckpointError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"Cannot write the checkpoint of step {started.step} to {folder}: {error}") from error


def load_checkpoint(run: Runtime, folder: Path, check: Callable[[Commit], None]) -> Commit:
    """Load weights, master weights and moments from a checkpoint written under any layout.

    One without optimizer state (`weights_only.py`) leaves the moments as they are and makes its weights the master
    weights. FP8 state stays as it is, and its history begins anew, if the checkpoint has none (only delayed scaling
    has it); one that has it for some products only is refused.

    Args:
        check: raises if the run must not go on from this commit; called before anything is loaded.

    Raises:
        DamagedCheckpoint: on every rank, if a file is not what was written, or would run something.
        CheckpointError: on every rank, if the checkpoint cannot be loaded for another reason, such as another model.
    """
    commit = from_rank_zero(lambda: read_commit(folder))
    check(commit)
    common, table = on_all_ranks(lambda: _read_small_files(folder, commit))
    only_weights = holds_only_weights(commit)
    state = sharded_weights(run) if only_weights else sharded_state(run, is_loading=True)
    state = {key: loaded_as_plain(part) if key.startswith("model") else part for key, part in state.items()}
    state = {
        key: _without_missing_fp8_state(part, table.state_dict_metadata, run.plan) if key.startswith("model") else part
        for key, part in state.items()
    }
    try:
        loaded = read_files(state, folder, commit, common, table)
    except _LOAD_ERRORS as error:
        raise damage_in(error) or CheckpointError(f"Cannot load {folder}: {reason_in(error)}") from error
    on_all_ranks(lambda: _check_fp8_states(loaded))
    for index, chunk in enumerate(run.chunks):
        chunk.module.load_state_dict(loaded[f"model{index}"])
    if only_weights:
        run.optimizer.reload_model_params()
        for index, chunk in enumerate(run.chunks):
            take_as_masters(run.optimizer, chunk.module, loaded[f"model{index}"])
    else:
        load_state(run.optimizer, loaded["optimizer"])
    return commit


def _read_small_files(folder: Path, commit: Commit) -> tuple[dict[str, Any], Any]:
    check_file(folder, CONFIG_FILE, commit)
    return read_common(folder, commit), read_table_of_contents(folder, commit)


def _check_fp8_states(loaded: dict[str, Any]) -> None:
    """Look into what Transformer Engine will unpickle."""
    for key, state in loaded.items():
        if key.startswith("model"):
            for name, value in state.items():
                if name.endswith(_FP8_STATE):
                    check_fp8_state(name, value)


def _without_missing_fp8_state(weights: dict[str, Any], stored: Collection[str], plan: RunPlan) -> dict[str, Any]:
    """Leave out FP8 state that the checkpoint lacks: all of it if its run had no delayed scaling; that of what runs in
    bfloat16, norms and output layer, which Transformer Engine writes and never reads, if the emulation wrote it."""
    of_products = {f"{gemm.name}.{_FP8_STATE}" for gemm in plan.gemms if gemm.in_fp8}
    has_state = any(key.partition("/")[0] in of_products for key in stored)  # "NAME._extra_state/shard_0_1"
    return {
        name: value
        for name, value in weights.items()
        if not name.endswith(_FP8_STATE) or value.unique_key in stored or (has_state and value.key in of_products)
    }


def sharded_state(run: Runtime, *, is_loading: bool) -> dict[str, Any]:
    """The state of a run as Megatron-Core shards it: one entry per model chunk, and the optimizer."""
    allocate_state(run.optimizer)
    write_own_shards(run.optimizer)
    metadata, state = _metadata(run), sharded_weights(run)
    model_state = {
        f"{index}.{key}": value for index in range(len(run.chunks)) for key, value in state[f"model{index}"].items()
    }
    # Megatron-Core collects garbage, by hand, in here: a walk over all of Python's objects, which took most of the time
    # that a save holds training up. Frozen, they are not walked.
    gc.freeze()
    try:
        state["optimizer"] = run.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    finally:
        gc.unfreeze()
    if not is_loading:
        for index in range(len(run.chunks)):
            state[f"model{index}"] = stored_from_masters(state[f"model{index}"], run.optimizer)
    return state


def sharded_weights(run: Runtime) -> dict[str, Any]:
    """One entry per model chunk."""
    return {
        f"model{index}": chunk.module.sharded_state_dict(metadata=_metadata(run))
        for index, chunk in enumerate(run.chunks)
    }


def _metadata(run: Runtime) -> dict[str, Any]:
    return {**_stored_metadata(), "dp_cp_group": run.groups.dp_cp}


def _stored_metadata() -> dict[str, Any]:
    return {"distrib_optim_sharding_type": "fully_reshardable"}
