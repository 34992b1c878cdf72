"""Saves and loads weights and optimizer state through Megatron-Core's `dist_checkpointing` (`torch_dist`), readable
under any layout."""

import logging
import queue
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from nemotron_train.checkpoint.commit import Commit, commit_folder, read_commit, start_folder
from nemotron_train.checkpoint.resume import checkpoints_folder, model_facts
from nemotron_train.checkpoint.weights_only import holds_only_weights
from nemotron_train.config.load import fingerprint
from nemotron_train.engine.groups import from_rank_zero
from nemotron_train.engine.optimizer import allocate_state
from nemotron_train.engine.wrap import weights_complete
from nemotron_train.errors import CheckpointError
from nemotron_train.runtime import Progress, Runtime

logger = logging.getLogger(__name__)

# torch's CheckpointException is a BaseException: left to itself it would pass every `except Exception`.
_SAVE_ERRORS = (OSError, RuntimeError, CheckpointingException, CheckpointException)
_LOAD_ERRORS = (*_SAVE_ERRORS, ValueError, KeyError)


def save_checkpoint(run: Runtime, progress: Progress, data_hash: str) -> Path:
    """Write one checkpoint under the run folder, all ranks together, and commit it.

    Args:
        data_hash: of everything that decided the samples up to now (`BlendPlan.past_hash`).

    Raises:
        CheckpointError: on rank 0, when any rank could not write; the temporary folder is gone then. The others lose
        their
            connection to it, or raise what they ran into themselves.
    """
    config = run.plan.config
    folder = from_rank_zero(lambda: start_folder(checkpoints_folder(config), progress.step))
    try:
        # Megatron-Core collects its writers' results in a queue that lives in a process of its own. A synchronous save
        # needs none, and a SIGTERM to the process group would end it just before the save that the signal asks for.
        filesystem_async._results_queue = queue.Queue()
        with weights_complete(run.chunks):
            state = sharded_state(run, is_loading=False)
            dist_checkpointing.save(state, str(folder), content_metadata=_stored_metadata())
    except _SAVE_ERRORS as error:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"Cannot write the checkpoint of step {progress.step} to {folder}: {error}") from error
    return from_rank_zero(
        lambda: commit_folder(
            folder,
            **asdict(progress),
            model=model_facts(config.model),
            config_fingerprint=fingerprint(config),
            data_hash=data_hash,
            layout=asdict(run.plan.layout),
            versions={name: version(name) for name in ("torch", "megatron-core", "numpy")},
        )
    )


def load_checkpoint(run: Runtime, folder: Path, check: Callable[[Commit], None]) -> Commit:
    """Load weights, master weights and moments from a checkpoint written under any layout.

    One without optimizer state (`weights_only.py`) leaves the moments as they are and makes its weights the master
    weights.

    Args:
        check: raises if the run must not go on from this commit; called before anything is loaded.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or of another model.
    """
    commit = read_commit(folder)
    check(commit)
    only_weights = holds_only_weights(commit)
    state = sharded_weights(run) if only_weights else sharded_state(run, is_loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"Cannot load {folder}: {error}") from error
    for index, chunk in enumerate(run.chunks):
        chunk.module.load_state_dict(loaded[f"model{index}"])
    if only_weights:
        run.optimizer.reload_model_params()
    else:
        run.optimizer.load_state_dict(loaded["optimizer"])
    return commit


def sharded_state(run: Runtime, *, is_loading: bool) -> dict[str, Any]:
    """The state of a run as Megatron-Core shards it: one entry per model chunk, and the optimizer."""
    if is_loading:
        allocate_state(run.optimizer)
    metadata, state = _metadata(run), sharded_weights(run)
    model_state = {
        f"{index}.{key}": value for index in range(len(run.chunks)) for key, value in state[f"model{index}"].items()
    }
    state["optimizer"] = run.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
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
