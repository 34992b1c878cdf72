"""The live objects of a run, built once by `trainer.py` and handed to each step."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron_train.engine.groups import Groups
from nemotron_train.engine.optimizer import Optimizer
from nemotron_train.engine.wrap import ModelChunk
from nemotron_train.plan.run_plan import RunPlan
from nemotron_train.platform.device import Platform


@dataclass(frozen=True)
class Runtime:
    plan: RunPlan
    platform: Platform
    groups: Groups
    chunks: Sequence[ModelChunk]  # one per virtual pipeline stage of this rank
    optimizer: Optimizer


@dataclass(frozen=True)
class Progress:
    """How far a run is: all the state of training besides weights and moments."""

    step: int = 0  # optimizer steps taken
    consumed_tokens: int = 0  # by those steps
    skipped_steps: int = 0  # of them, those whose gradient was not finite
    origin: str | None = None  # the checkpoint of another run that this run started from
