"""Phases of one job: samples get longer and documents are told apart, under any layout, with stops on the way."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.config.schema import BatchStep, DocumentBoundary, PhaseConfig, RunConfig, SourceWeight
from tests.ranks import RankPool
from tests.small_runs import BATCH, SEQ, logged, read_metrics, refusal, small_config, train

STEP = SEQ * BATCH
WEIGHTS = [SourceWeight("a", 0.6), SourceWeight("b", 0.4)]
STEPS = 9


def phased(corpus: Path, run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    """Four steps of 8 x 32 tokens, two of 4 x 128, then 8 x 64 to the end."""
    config = small_config(corpus, run_dir, steps=12, **sections)
    phases = [
        PhaseConfig(0, WEIGHTS),
        PhaseConfig(4 * STEP, [SourceWeight("a", 0.2), SourceWeight("b", 0.8)], seq_length=4 * SEQ),
        PhaseConfig(8 * STEP, WEIGHTS, seq_length=2 * SEQ),
    ]
    batches = [BatchStep(4 * STEP, 4), BatchStep(8 * STEP, 8)]
    return replace(
        config,
        data=replace(config.data, phases=phases),
        train=replace(config.train, batch_schedule=batches, train_tokens=14 * STEP),
    )


def losses(run_dir: Path) -> list[float]:
    return logged("loss", read_metrics(run_dir))


@pytest.fixture(scope="module")
def straight(ranks: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("phases")
    ranks.run(train, 1, phased(corpus, run_dir))
    return losses(run_dir)


def test_samples_change_their_length_at_the_phases(
    ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float]
) -> None:
    """Fails if a phase's length or batch does not reach the steps, or the steps are not those of the plan."""
    ranks.run(train, 1, phased(corpus, tmp_path))
    records = [record for record in read_metrics(tmp_path) if "loss" in record]
    assert [record["seq_length"] for record in records] == [SEQ] * 4 + [4 * SEQ] * 2 + [2 * SEQ] * 3
    assert [record["global_batch_size"] for record in records] == [8] * 4 + [4] * 2 + [8] * 3
    assert [record["consumed_tokens"] for record in records] == [STEP * n for n in (1, 2, 3, 4, 6, 8, 10, 12, 14)]
    assert losses(tmp_path) == straight


@pytest.mark.parametrize(
    ("layout", "micro_batch_size"),
    [
        ({"tensor_parallel_size": 2, "sequence_parallel": True}, 4),
        ({"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}, 1),
        ({}, 1),
        ({"context_parallel_size": 2}, 4),
    ],
    ids=["TP2+SP", "PP2xVPP2", "DP2", "CP2"],
)
def test_every_layout_follows_the_phases(
    ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float], layout: dict[str, Any], micro_batch_size: int
) -> None:
    """Fails if a rank keeps buffers or shapes of the first phase's length."""
    ranks.run(train, 2, phased(corpus, tmp_path, parallel=layout, train={"micro_batch_size": micro_batch_size}))
    assert losses(tmp_path) == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize("stop_step", [3, 4, 5, 6, 7])
def test_stopping_around_a_change_of_length_changes_nothing(
    ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float], stop_step: int
) -> None:
    """Fails if the place in the data after a change of length does not follow from consumed_tokens."""
    config = phased(corpus, tmp_path)
    ranks.run(train, 1, config, stop_step)
    ranks.run(train, 1, config)
    assert losses(tmp_path) == straight


def test_a_batch_that_reaches_over_a_change_of_length_is_refused_on_resume(
    ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """Fails if a run that changed its batch size dies at the change of length, days later."""
    config = phased(corpus, tmp_path)
    ranks.run(train, 1, config, 1)
    named = replace(config.checkpoint, allow_change=["train.global_batch_size"])
    larger = replace(config, train=replace(config.train, global_batch_size=16), checkpoint=named)
    [said] = ranks.run(refusal, 1, larger)
    assert "Samples change from 32 to 128 tokens at 1024 tokens, within a step" in said


def test_fill_in_the_middle_survives_a_stop(
    ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float]
) -> None:
    """Fails if the rates of a phase do nothing, or the documents that are rearranged depend on where a run resumed."""
    curves = []
    for name, stops in (("straight", [None]), ("stopped", [5, None])):
        config = phased(corpus, tmp_path / name)
        weights = [SourceWeight("a", 0.6, fim_rate=0.5), SourceWeight("b", 0.4)]
        phases = [config.data.phases[0], replace(config.data.phases[1], weights=weights), config.data.phases[2]]
        data = replace(config.data, phases=phases, fim_tokens=["91", "92", "93"], eod_token="94")
        for stop in stops:
            ranks.run(train, 1, replace(config, data=data), stop)
        curves.append(losses(tmp_path / name))
    assert curves[0] == curves[1]
    assert curves[0][:4] == straight[:4]
    assert curves[0][4] != straight[4]


def test_documents_told_apart_change_the_run_alike_under_every_layout(
    ranks: RankPool, corpus: Path, tmp_path: Path, straight: list[float]
) -> None:
    """Fails if data.document_boundary does nothing, or does other things under tensor or context parallelism."""
    data = {"document_boundary": DocumentBoundary.reset, "eod_token": str(94)}
    curves = []
    layouts = (1, {}), (2, {"tensor_parallel_size": 2, "sequence_parallel": True}), (2, {"context_parallel_size": 2})
    for number, (world_size, layout) in enumerate(layouts):
        folder = tmp_path / str(number)
        config = phased(corpus, folder, parallel=layout, train={"micro_batch_size": 4})
        ranks.run(train, world_size, replace(config, data=replace(config.data, **data)))
        curves.append(losses(folder))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] == pytest.approx(curves[2], rel=1e-5)
    assert curves[0] != pytest.approx(straight, rel=1e-3)
