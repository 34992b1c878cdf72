"""What becomes of a step whose gradient is not finite: nothing moves on any rank, it is counted, and too many in a row
end the run."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.schema import RunConfig
from nemotron_train.data.run_data import open_run_data
from nemotron_train.errors import NumericsError
from nemotron_train.loss import MeanLoss
from nemotron_train.plan.ranges import RANGES
from nemotron_train.platform.signals import StopRequest
from nemotron_train.runtime import Progress, Runtime
from nemotron_train.step import StepResult
from nemotron_train.trainer import Trainer, advance
from tests.engine.live import Arrays, live_run, named_parameters, to_array, weights_of
from tests.ranks import RankPool
from tests.small_runs import read_metrics, small_config

FAULTY_RANK = 1
FAULTY_NAME = "decoder.layers.0.mixer.in_proj.weight"


class WatchedTrainer(Trainer):
    """Keeps what the optimizer holds after every step."""

    history: list[Arrays]
    updated: list[bool]

    def check_skips(self, result: Any, progress: Any) -> None:
        self.history.append(everything(self.run))
        self.updated.append(result.updated)
        super().check_skips(result, progress)


def everything(run: Runtime) -> Arrays:
    """Weights, and of this rank's shard the master weights, moments and step counters of AdamW."""
    held = weights_of(run)
    for part, optimizer in enumerate(run.optimizer.chained_optimizers):
        adamw = optimizer.optimizer
        for number, parameter in enumerate(p for group in adamw.param_groups for p in group["params"]):
            held[f"{part}.{number}.master"] = to_array(parameter)
            held |= {f"{part}.{number}.{key}": to_array(value) for key, value in adamw.state[parameter].items()}
    return held


def train_with_fault(
    config: RunConfig, value: float, faulty_steps: Collection[int]
) -> tuple[list[Arrays], list[bool], str]:
    """Train; one element of one gradient becomes `value` on one rank in the given steps (the first is 0), in one of its
    micro-batches.

    Returns:
        what the optimizer held after every step, whether it was updated, and the NumericsError that ended the run,
        or "".
    """
    data = open_run_data(config)
    with live_run(config) as run:
        trainer = WatchedTrainer(run, data, StopRequest(), is_reporter=run.groups.dp.rank() == 0)
        trainer.history, trainer.updated = [], []
        micro_batches_seen = 0

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal micro_batches_seen
            step, micro_batch = divmod(micro_batches_seen, 2)
            micro_batches_seen += 1
            if step in faulty_steps and micro_batch == 0:
                gradient = gradient.clone()
                gradient[3, 5] = value
            return gradient

        if run.groups.dp.rank() == FAULTY_RANK:
            dict(named_parameters(run))[FAULTY_NAME].register_hook(spoil)
        try:
            trainer.train()
        except NumericsError as error:
            return trainer.history, trainer.updated, str(error)
    return trainer.history, trainer.updated, ""


def faulty_config(corpus: Path, run_dir: Path, steps: int, max_skipped_steps: int) -> RunConfig:
    return small_config(
        corpus, run_dir, steps=steps, model={"layer_pattern": "M*-"}, train={"max_skipped_steps": max_skipped_steps},
        lr={"decay_tokens": 256, "warmup_tokens": 0},
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_one_bad_element_on_one_rank_changes_nothing_anywhere(
    ranks: RankPool, corpus: Path, tmp_path: Path, value: float
) -> None:
    """Fails if any rank updates, a moment or step counter moves, the step is not counted, or the next one is not a
    usual one."""
    config = faulty_config(corpus, tmp_path, steps=5, max_skipped_steps=1)
    for history, updated, error in ranks.run(train_with_fault, 2, config, value, (1, 3)):
        assert (updated, error) == ([True, False, True, False, True], "")
        assert any(key.endswith("exp_avg_sq") for key in history[0])
        for before, after, moved in zip(history, history[1:], updated[1:], strict=False):
            different = {name for name in before if not np.array_equal(before[name], after[name])}
            assert bool(different) == moved, different
            assert all(np.isfinite(array).all() for array in after.values())
    records = [record for record in read_metrics(tmp_path) if "loss" in record]
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 2, 2]
    assert all(math.isfinite(record["loss"]) for record in records)


def test_too_many_in_a_row_end_the_run_on_every_rank(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if the limit counts steps that were not in a row, is off by one, or stops one rank only."""
    config = faulty_config(corpus, tmp_path, steps=12, max_skipped_steps=2)
    for _, updated, error in ranks.run(train_with_fault, 2, config, math.nan, (1, 2, 4, 5, 6, 7)):
        assert updated == [True, False, False, True, False, False, False]
        assert "3 steps in a row, up to step 7" in error
        assert "The weights are those of step 4" in error
        assert "train.max_skipped_steps=2" in error


def test_the_longest_row_that_may_be_asked_for_is_seen() -> None:
    """Fails if a limit can be set that the numbers of skipped steps, which are not kept for ever, cannot pass."""
    limit = int(RANGES["train.max_skipped_steps"].high)
    skipped = StepResult(MeanLoss(0.0, (), 0), grad_norm=math.inf, learning_rate=0.0, updated=False)
    progress = Progress()
    for _ in range(limit + 1):
        progress = advance(progress, 8, skipped)
    assert progress.skipped_in_a_row > limit
