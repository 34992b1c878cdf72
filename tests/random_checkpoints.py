"""Checkpoints of random weights, without a training run: written by one process, or saved again under any layout."""

from pathlib import Path

import torch
from torch import Tensor

from nemotron_train.checkpoint.store import load_checkpoint, save_checkpoint
from nemotron_train.config.schema import ModelSection, RunConfig
from nemotron_train.convert.new_run import parameter_shapes, write_new_run
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.optimizer import allocate_state
from nemotron_train.model.names import Start, rule_for
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.runtime import Progress
from nemotron_train.trainer import build_runtime


def random_weights(model: ModelSection, seed: int = 1) -> dict[str, Tensor]:
    """Return weights in which every value is another, and each matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(model).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = noise * (0.3 if name.endswith("conv1d.weight") else 0.08)
        elif rule_for(name).start is Start.dt_bias:
            weights[name] = noise - 3.0
        elif rule_for(name).start is Start.a_log:
            weights[name] = noise.abs()
        else:
            weights[name] = 1.0 + 0.2 * noise
    return weights


def random_checkpoint(run_dir: Path, model: ModelSection, seed: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    weights = random_weights(model, seed)
    dtypes = {name: torch.float32 if rule_for(name).float32 else dtype for name in weights}
    return write_new_run(run_dir, model, dtypes, lambda name: weights[name].to(dtypes[name]), {"seed": seed})


def save_again(config: RunConfig, checkpoint: Path) -> Path:
    """Load a checkpoint as this process's rank of `config`'s layout and save it in its run folder; for `ranks.run`."""
    me = launched_rank()
    plan, platform = plan_run(config, me.world_size), choose_platform(me)
    with process_groups(plan.layout, platform, me, timeout_seconds=60, seed=config.run.seed) as groups:
        run = build_runtime(plan, platform, groups)
        load_checkpoint(run, checkpoint, lambda commit: None)
        allocate_state(run.optimizer)
        return save_checkpoint(run, Progress(step=1), "none")
