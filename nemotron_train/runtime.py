"""The live objects of a run, built once by `trainer.py` and handed to each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_train.data.batch import RankShare
from nemotron_train.data.sequence_part import SequencePart
from nemotron_train.engine.captured_passes import CapturedPasses
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
    captured: CapturedPasses | None = None  # takes training's passes, where train.cuda_graphs asks for it

    @property
    def share(self) -> RankShare:
        """What this rank reads of every global batch."""
        return RankShare(
            dp_rank=self.groups.dp.rank(),
            dp_size=self.groups.dp.size(),
            micro_batch_size=self.plan.config.train.micro_batch_size,
            part=SequencePart(self.groups.cp.rank(), self.groups.cp.size()),
        )

    def close(self) -> None:
        """End what must end before the process groups do. Not after an error: it waits for the GPU."""
        if self.captured is not None:
            self.captured.close()


@dataclass(frozen=True)
class Progress:
    """How far a run is: all the state of training besides weights and moments."""

    step: int = 0  # optimizer steps taken
    consumed_tokens: int = 0  # by those steps
    skipped_steps: int = 0  # of them, those whose gradient was not finite
    skipped_at: tuple[int, ...] = ()  # the last of those steps, by number
    origin: str | None = None  # the checkpoint of another run that this run started from
    changes: tuple[dict[str, Any], ...] = ()  # of the configuration on resume: step, consumed_tokens, changed

    @property
    def skipped_in_a_row(self) -> int:
        """Steps up to this one that were skipped, without one between them that was not."""
        missed = set(self.skipped_at)
        return next(count for count in range(len(missed) + 1) if self.step - count not in missed)
