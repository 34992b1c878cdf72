"""Does a whole run in emulated FP8 learn as in bf16, and go on from its checkpoints as if it had not stopped?"""

from pathlib import Path
from typing import Any

import pytest

from nemotron_train.config.schema import PrecisionFormat
from tests.precision.small_fp8 import FORMATS, TP2_SP, fp8_config
from tests.ranks import RankPool
from tests.small_runs import logged, read_metrics, train

STEPS = 20


def losses(run_dir: Path) -> list[float]:
    return logged("loss", read_metrics(run_dir))


def curve(ranks: RankPool, corpus: Path, run_dir: Path, format: PrecisionFormat) -> list[float]:
    ranks.run(train, 1, fp8_config(corpus, run_dir, format, steps=STEPS))
    return losses(run_dir)


@pytest.fixture(scope="module")
def in_bf16(ranks: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return curve(ranks, corpus, tmp_path_factory.mktemp("bf16"), PrecisionFormat.bf16)


@pytest.mark.parametrize("format", [FORMATS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FORMATS[1:])])
def test_fp8_follows_bf16_and_is_not_bf16(
    ranks: RankPool, corpus: Path, tmp_path: Path, in_bf16: list[float], format: PrecisionFormat
) -> None:
    """Fails if a recipe learns another way than its rounding explains, 1 % of the loss at any step, or if a run that
    was asked for FP8 quantises nothing."""
    found = curve(ranks, corpus, tmp_path, format)
    assert found == pytest.approx(in_bf16, rel=1e-2)
    assert found[-1] < 0.5 * found[0]
    assert found[0] != in_bf16[0]


@pytest.mark.parametrize(
    ("format", "world_size", "parallel"),
    [
        ("fp8_delayed", 2, TP2_SP),
        pytest.param("fp8_delayed", 1, {}, marks=pytest.mark.slow),
        pytest.param("fp8_block", 2, {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stopped_goes_on_bitwise(
    ranks: RankPool, corpus: Path, tmp_path: Path, format: str, world_size: int, parallel: dict[str, Any]
) -> None:
    """Fails if a checkpoint forgets scales or maxima of delayed scaling, or if evaluating at the step of the checkpoint
    changes them."""
    for name, stops in (("straight", [None]), ("stopped", [4, None])):
        for stop in stops:
            config = fp8_config(
                corpus,
                tmp_path / name,
                PrecisionFormat(format),
                steps=6,
                parallel=parallel,
                train={"eval_every_steps": 4, "eval_tokens": 300},
            )
            ranks.run(train, world_size, config, stop)
    assert len(losses(tmp_path / "straight")) == 6
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


@pytest.mark.slow
def test_delayed_scales_may_be_read_under_another_layout(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if scales are stored by rank, or read by the wrong layer: without them the loss would jump."""
    for name, layouts in (
        ("one", [(1, {}, None)]),
        ("many", [(2, TP2_SP, 2), (2, {"pipeline_parallel_size": 2}, 4), (1, {}, None)]),
    ):
        for world_size, parallel, stop in layouts:
            config = fp8_config(corpus, tmp_path / name, PrecisionFormat.fp8_delayed, steps=6, parallel=parallel)
            ranks.run(train, world_size, config, stop)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
