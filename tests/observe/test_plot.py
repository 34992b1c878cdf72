"""loss.png shows what it claims: checked on the figure's own lines and texts."""

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from nemotron_train.config.schema import PhaseConfig, SourceWeight
from nemotron_train.observe.plot import build_loss_figure, draw_loss, phase_name, smooth

PHASES = [
    PhaseConfig(start_tokens=0, weights=[SourceWeight("code", 3.0), SourceWeight("prose", 1.0)]),
    PhaseConfig(start_tokens=40_000, weights=[SourceWeight("code", 1.0), SourceWeight("prose", 1.0)]),
]


def records_of(num_steps: int) -> list[dict[str, int | float | None]]:
    records: list[dict[str, int | float | None]] = []
    for step in range(1, num_steps + 1):
        loss = None if step == 7 else 2.0 + 6.0 / step
        records.append({"step": step, "consumed_tokens": 1000 * step, "loss": loss, "learning_rate": 1e-3 * step})
    for step in range(20, num_steps + 1, 20):
        records[step - 1] = records[step - 1] | {"eval_loss": 2.5 + 6.0 / step}
    return records


def line_labelled(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_picture_shows_the_recorded_values_over_tokens() -> None:
    """Fails if a curve is drawn over steps, shifted, or misses points (a step without a loss is left out)."""
    records = records_of(100)
    loss_axes, rate_axes = build_loss_figure(records, PHASES, "a run", {}).axes
    with_loss = [record for record in records if record["loss"] is not None]
    assert list(loss_axes.lines[0].get_xdata()) == [record["consumed_tokens"] for record in with_loss]
    assert list(loss_axes.lines[0].get_ydata()) == [record["loss"] for record in with_loss]
    assert line_labelled(loss_axes, "held-out loss") == (
        [20_000, 40_000, 60_000, 80_000, 100_000],
        [2.5 + 6.0 / step for step in range(20, 101, 20)],
    )
    assert list(rate_axes.lines[0].get_ydata()) == [1e-3 * step for step in range(1, 101)]
    assert loss_axes.get_title(loc="left") == "a run"


def test_the_smoothed_curve_lies_on_a_straight_line_and_halves_noise() -> None:
    """Fails if smoothing lags behind a falling curve or does not average."""
    falling = [10.0 - 0.01 * i for i in range(300)]
    assert smooth(falling)[:-10] == pytest.approx(falling[:-10])
    alternating = [1.0 if i % 2 else -1.0 for i in range(300)]
    assert max(abs(value) for value in smooth(alternating)[10:]) < 0.5


def test_phase_boundaries_are_marked_where_they_begin_and_named() -> None:
    """Fails if the line of a phase is missing, misplaced, or its name does not say its weights."""
    loss_axes, rate_axes = build_loss_figure(records_of(100), PHASES, "", {}).axes
    for axes in (loss_axes, rate_axes):
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [40_000]
    assert [text.get_text() for text in loss_axes.texts] == [
        "phase 1: code 75 %, prose 25 %",
        "phase 2: code 50 %, prose 50 %",
    ]


def test_a_phase_that_the_run_has_not_reached_does_not_stretch_the_picture() -> None:
    """Fails if an early picture of a long run is squeezed into its left edge."""
    loss_axes, _ = build_loss_figure(records_of(20), PHASES, "", {}).axes
    assert loss_axes.get_xlim()[1] < 40_000
    assert [text.get_text() for text in loss_axes.texts] == ["phase 1: code 75 %, prose 25 %"]


def test_yardsticks_are_level_lines_inside_the_picture() -> None:
    """Fails if the line of another model's loss is missing, misplaced or cut off."""
    loss_axes, _ = build_loss_figure(records_of(100), PHASES, "", {"bigram model": 1.5, "unigram": 9.0}).axes
    levels = {line.get_ydata()[0] for line in loss_axes.lines if len(set(line.get_ydata())) == 1}
    assert {1.5, 9.0} <= levels
    bottom, top = loss_axes.get_ylim()
    assert bottom < 1.5 < 9.0 < top
    assert any(text.get_text() == "bigram model 1.500" for text in loss_axes.texts)


def test_one_spike_does_not_squeeze_the_curve() -> None:
    """Fails if a single huge loss sets the range of the axis."""
    records = records_of(1000)
    records[500] = records[500] | {"loss": 4000.0}
    loss_axes, _ = build_loss_figure(records, [], "", {}).axes
    assert loss_axes.get_ylim()[1] < 12.0


def test_many_sources_are_cut_to_the_heaviest_three() -> None:
    """Fails if a blend of many sources overruns the picture, or a source of weight 0 is named."""
    weights = [SourceWeight(f"s{i}", float(i)) for i in range(6)]
    assert phase_name(2, PhaseConfig(0, weights)) == "phase 2: s5 33 %, s4 27 %, s3 20 %, …"


@pytest.mark.parametrize("records", [[], [{"step": 1, "consumed_tokens": 4096, "loss": math.nan}], records_of(1)])
def test_a_run_that_hardly_began_can_be_drawn(tmp_path: Path, records: list) -> None:
    """Fails if drawing needs more than what a run interrupted at once has left behind."""
    draw_loss(records, PHASES, tmp_path / "loss.png", "short")
    assert imread(tmp_path / "loss.png").shape[2] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
