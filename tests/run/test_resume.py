"""Stopping and going on changes nothing, at any step and on any number of data-parallel ranks."""

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.schema import PrecisionFormat, Recompute, RunConfig
from nemotron_train.data.ledger import samples_of_step
from nemotron_train.trainer import Trainer
from tests.ranks import RankPool
from tests.small_runs import logged, read_metrics, refusal, small_config, train

STEPS = 12
BEGUN_PHASE = r"data\.phases\[0\]\.weights\[a\]\.weight: 0\.7 then, 0\.2 now"


def losses(run_dir: Path) -> list[float]:
    return logged("loss", read_metrics(run_dir))


@pytest.fixture(scope="module")
def straight(ranks: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of an uninterrupted run on two data-parallel ranks."""
    run_dir = tmp_path_factory.mktemp("straight")
    ranks.run(train, 2, small_config(corpus, run_dir, steps=STEPS))
    return losses(run_dir)


@pytest.mark.parametrize("stop_step", [1, 7, 10, 11])  # 10: the step at which the second phase begins
def test_a_run_that_stopped_goes_on_bitwise(
    ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float], stop_step: int
) -> None:
    """Fails if a checkpoint forgets weights, moments, the step of AdamW, or the place in the data."""
    config = small_config(corpus, tmp_path, steps=STEPS)
    ranks.run(train, 2, config, stop_step)
    assert len(losses(tmp_path)) == stop_step
    ranks.run(train, 2, config)
    assert losses(tmp_path) == straight


def test_a_save_beside_training_holds_the_step_it_began_at(
    ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float]
) -> None:
    """Fails if steps taken while the checkpoint is written get into it, or it is not there when the run ends."""
    config = small_config(corpus, tmp_path, steps=STEPS, checkpoint={"every_steps": 3, "asynchronous": True})
    ranks.run(train, 2, config, 8)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000000008")  # written when the run stopped
    ranks.run(train, 2, config)
    assert losses(tmp_path) == straight
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        f"step_{step:09d}" for step in (3, 6, 9, 12)
    }


def random_states_around_training(config: RunConfig) -> list[bool]:
    """Whether training left the states of Python's, numpy's and torch's generators as they were."""
    seen: list[tuple[Any, ...]] = []
    take_steps = Trainer.take_steps

    def watched(self: Trainer, *args: Any) -> bool:
        seen.append(random_states())
        finished = take_steps(self, *args)
        seen.append(random_states())
        return finished

    Trainer.take_steps = watched
    try:
        train(config)
    finally:
        Trainer.take_steps = take_steps
    before, after = seen
    return [a == b for a, b in zip(before, after, strict=True)]


def random_states() -> tuple[Any, ...]:
    kind, key, *rest = np.random.get_state()  # noqa: NPY002 (the generator that libraries would draw from)
    return random.getstate(), (kind, key.tolist(), *rest), torch.get_rng_state().tolist()


def test_training_draws_no_random_number(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a step, an evaluation or a save draws from a generator: then checkpoints would have to hold its state on
    every rank."""
    layout = {"tensor_parallel_size": 2, "sequence_parallel": True}
    train_keys = {"eval_every_steps": 2, "recompute": Recompute.full, "micro_batch_size": 4}
    config = small_config(corpus, tmp_path, steps=7, parallel=layout, checkpoint={"every_steps": 2})
    config = replace(config, train=replace(config.train, **train_keys))
    assert ranks.run(random_states_around_training, 2, config) == [[True, True, True]] * 2


def test_bf16_resumes_bitwise_from_its_float32_master_weights(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a resume starts from weights rounded to bf16, or mixes the master weights of one group with
    another's."""
    curves = []
    for name, stops in (("straight", [None]), ("stopped", [5, None])):
        config = small_config(corpus, tmp_path / name, steps=STEPS, precision={"format": PrecisionFormat.bf16})
        for stop_step in stops:
            ranks.run(train, 2, config, stop_step)
        curves.append(losses(tmp_path / name))
    assert curves[0] == curves[1]


def test_the_number_of_data_parallel_ranks_may_change(
    ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float]
) -> None:
    """Fails if one rank, then four, then two read other tokens than two ranks from start to end."""
    config = small_config(corpus, tmp_path, steps=STEPS)
    for world_size, stop_step in ((1, 3), (4, 8), (2, None)):
        ranks.run(train, world_size, config, stop_step)
    assert losses(tmp_path) == pytest.approx(straight, rel=1e-5)


def test_the_layout_may_change(ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float]) -> None:
    """Fails if weights or moments written under one layout land elsewhere when read under another."""
    layouts = (
        (2, 3, {"tensor_parallel_size": 2, "sequence_parallel": True}),
        (2, 6, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
        (4, 9, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        (2, 11, {"context_parallel_size": 2}),
        (1, None, {}),
    )
    for world_size, stop_step, layout in layouts:
        ranks.run(train, world_size, small_config(corpus, tmp_path, steps=STEPS, parallel=layout), stop_step)
    assert losses(tmp_path) == pytest.approx(straight, rel=1e-5)


def test_a_longer_run_goes_on_where_the_shorter_one_ended(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if raising train_tokens changes a step that was taken before the learning rate began to decay."""
    short = small_config(corpus, tmp_path / "short", steps=8)
    longer = {"allow_change": ["train.train_tokens"]}  # it moves the decay
    long = small_config(corpus, tmp_path / "short", steps=STEPS, checkpoint=longer)
    whole = small_config(corpus, tmp_path / "whole", steps=STEPS)
    ranks.run(train, 2, short)
    ranks.run(train, 2, long)
    ranks.run(train, 2, whole)
    assert losses(tmp_path / "short")[:4] == losses(tmp_path / "whole")[:4]  # the short run decays from step 4 on
    assert len(losses(tmp_path / "short")) == STEPS


def test_a_damaged_checkpoint_is_passed_over_and_its_step_saved_again(
    ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """Fails if a run that fell back to an older checkpoint stops for ever at the step of the damaged one."""
    config = small_config(corpus, tmp_path, steps=6, checkpoint={"every_steps": 2})
    ranks.run(train, 1, config, 4)
    metadata = tmp_path / "checkpoints" / "step_000000004" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-1])
    ranks.run(train, 1, config)
    assert len(losses(tmp_path)) == 6
    folders = sorted(path.name.split("-")[0] for path in (tmp_path / "checkpoints").iterdir())
    assert folders == [
        "step_000000002",
        "step_000000004",
        "step_000000004.damaged",
        "step_000000006",
    ]


def test_a_resumed_run_uses_the_optimizer_it_is_asked_for(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a checkpoint's own betas and epsilon silently replace the configured ones."""
    ranks.run(train, 1, small_config(corpus, tmp_path, steps=6), 2)
    start = {"resume": str(tmp_path / "checkpoints" / "step_000000002")}
    curves = []
    for number, optim in enumerate(({}, {"adam_beta1": 0.5}, {"adam_beta2": 0.5}, {"adam_epsilon": 1e-2})):
        config = small_config(corpus, tmp_path / str(number), steps=6, optim=optim, checkpoint=start)
        ranks.run(train, 1, config)
        curves.append(losses(tmp_path / str(number)))
    assert len({curve[0] for curve in curves}) == 1  # before any update with the new values
    assert len({curve[-1] for curve in curves}) == 4


def changed(config: RunConfig) -> dict[str, RunConfig]:
    """What is said, and the configuration it is said of."""
    data = replace(config.data, phases=[replace(config.data.phases[0], weights=config.data.phases[1].weights)])
    return {
        "run.seed": replace(config, run=replace(config.run, seed=6)),
        BEGUN_PHASE: replace(config, data=data),
        "model.mamba_state_dim": replace(config, model=replace(config.model, mamba_state_dim=16)),
    }


def test_another_past_or_model_is_refused(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a run goes on, without a word, on other data or another model than its checkpoint's, or does not show
    what differs; or if steps that are not logged are missing in the ledger of what was read."""
    config = small_config(corpus, tmp_path, steps=STEPS, log={"every_steps": 2})
    ranks.run(train, 1, config, 3)
    for what, other in changed(config).items():
        [said] = ranks.run(refusal, 1, other)
        assert re.search(what, said), said
    assert len(losses(tmp_path)) == 2
    assert all(samples_of_step(tmp_path, step) is not None for step in (1, 2, 3))
