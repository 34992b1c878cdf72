"""Runs whose whole state is a function of the step, so that a checkpoint can be recognised bit by bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from nemotron_train.checkpoint.saver import Saver
from nemotron_train.checkpoint.store import save_checkpoint
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.run_data import RunData, open_run_data
from nemotron_train.engine.optimizer import allocate_state
from nemotron_train.platform.signals import StopRequest
from nemotron_train.runtime import Progress, Runtime
from nemotron_train.trainer import Trainer
from tests.small_runs import BATCH, SEQ, small_config

STEP_TOKENS = SEQ * BATCH


def tiny_config(corpus: Path, run_dir: Path, **checkpoint: Any) -> RunConfig:
    """Three layers, one of each kind; long enough that no test reaches its end."""
    parallel = checkpoint.pop("parallel", {})
    return small_config(
        corpus,
        run_dir,
        steps=100_000,
        model={"layer_pattern": "M*-"},
        checkpoint={"every_steps": 1, **checkpoint},
        parallel=parallel,
        data={"max_epochs": 1e9},
    )


def progress_at(step: int) -> Progress:
    return Progress(step=step, consumed_tokens=step * STEP_TOKENS)


def state_tensors(run: Runtime) -> Iterator[torch.Tensor]:
    """Weights, master weights and both moments of this rank."""
    for chunk in run.chunks:
        yield from (parameter.data for parameter in chunk.module.parameters())
    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                yield from (part.optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))


def fill(run: Runtime, step: int) -> None:
    """Give every tensor the values of a step."""
    allocate_state(run.optimizer)
    for chunk in run.chunks:
        for parameter in chunk.module.parameters():
            parameter.data.fill_(step)
    run.optimizer.reload_model_params()  # master weights
    for part in run.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["exp_avg"].fill_(step + 0.25)
            state["exp_avg_sq"].fill_(step + 0.5)


def filled_step(run: Runtime) -> int | None:
    """The step whose values every tensor has, or None."""
    tensors = list(state_tensors(run))
    step = int(tensors[0].flatten()[0])
    expected = torch.tensor([step, step + 0.25, step + 0.5])
    return step if all(torch.isin(tensor.float(), expected).all() for tensor in tensors) else None


def digest(run: Runtime) -> str:
    """A hash of this rank's whole state."""
    hashed = xxhash.xxh3_128()
    for tensor in state_tensors(run):
        hashed.update(np.ascontiguousarray(tensor.detach().float().numpy()))
    return hashed.hexdigest()


def trainer_of(run: Runtime, data: RunData | None = None) -> Trainer:
    """The real trainer around a run, to resume with."""
    config = run.plan.config
    return Trainer(run, data or open_run_data(config), StopRequest(), is_reporter=False)


def save_steps(run: Runtime, data: RunData, steps: list[int]) -> None:
    """Save the filled state of each step as the run would."""
    for step in steps:
        fill(run, step)
        save_checkpoint(run, progress_at(step), data.blend.past_hash(step * STEP_TOKENS))


def saver_of(run: Runtime, data: RunData, events: list[str]) -> Saver:
    return Saver(run, data.blend, events.append)


def copy_run(source: Path, target: Path) -> None:
    """Replace a run folder's checkpoints by those of another."""
    shutil.rmtree(target / "checkpoints", ignore_errors=True)
    shutil.copytree(source, target / "checkpoints")
