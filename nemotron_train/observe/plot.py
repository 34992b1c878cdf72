"""What did the run learn, in one picture? Draws `loss.png`: training and held-out loss, below them the learning rate.

The x axis is tokens. Phases of the blend are marked where they begin, with the weights of their sources; losses of
simpler models can be drawn as level lines to compare with. Figures are objects, without pyplot's global state.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from nemotron_train.config.schema import PhaseConfig
from nemotron_train.observe.metrics import Record
from nemotron_train.plan.chart_style import INK, MUTED, RATE, style_axes, write_png

TRAIN, HELD_OUT = "#2f6fb5", "#d1495b"
SMOOTHING_FRACTION = 0.02  # of the run: how much of it one point of the smoothed curve averages

Curve = tuple[list[float], list[float]]


def draw_loss(
    records: Sequence[Record],
    phases: Sequence[PhaseConfig],
    path: Path,
    title: str,
    yardsticks: Mapping[str, float] | None = None,
) -> None:
    """Write the picture of a run; a picture that is there is replaced in one step.

    Args:
        records: as read from `metrics.jsonl`; values may be missing or null.
        yardsticks: name -> held-out loss (nats per token) of a model to compare with.
    """
    figure = build_loss_figure(records, phases, title, yardsticks or {})
    write_png(figure, path)


def build_loss_figure(
    records: Sequence[Record], phases: Sequence[PhaseConfig], title: str, yardsticks: Mapping[str, float]
) -> Figure:
    """Return the figure with its two panels, loss first."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    for axes in (loss_axes, rate_axes):
        style_axes(axes)
    _draw_loss_curves(loss_axes, records)
    _draw_yardsticks(loss_axes, yardsticks)
    _limit_loss_range(loss_axes, records, yardsticks)
    if any(math.isfinite(x) for line in loss_axes.lines for x in line.get_ydata()):
        loss_axes.legend(
            loc="upper right", facecolor="white", edgecolor="none", framealpha=1, labelcolor=INK, fontsize=10
        )
    rate_axes.plot(*curve(records, "learning_rate"), color=RATE, linewidth=1.6)
    rate_axes.set_ylim(bottom=0)
    _mark_phases(loss_axes, rate_axes, phases)
    loss_axes.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=26 if len(phases) > 1 else 10)
    loss_axes.set_ylabel("loss (nats per token)", color=INK)
    rate_axes.set_ylabel("learning rate", color=INK)
    rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    rate_axes.set_xlabel("tokens trained on", color=INK)
    rate_axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    rate_axes.set_xlim(left=0)
    figure.align_ylabels()
    return figure


def curve(records: Sequence[Record], name: str) -> Curve:
    """Return (consumed tokens, values) of the records that hold a finite value of this name."""
    points = [(record.get("consumed_tokens"), record.get(name)) for record in records]
    finite = [(x, y) for x, y in points if x is not None and y is not None and math.isfinite(y)]
    return [x for x, _ in finite], [y for _, y in finite]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over the values around each one, `SMOOTHING_FRACTION` of them all (at least 5).

    At the start the window shrinks to both sides alike: a mean over one side only would lag behind a steep fall.
    """
    half = max(2, round(SMOOTHING_FRACTION * len(values) / 2))
    sums = list(accumulate(values, initial=0.0))
    windows = [(i - min(i, half), min(i + min(i, half) + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def _draw_loss_curves(axes: Axes, records: Sequence[Record]) -> None:
    tokens, losses = curve(records, "loss")
    axes.plot(tokens, losses, color=TRAIN, alpha=0.28, linewidth=0.9)
    if losses:
        smoothed = smooth(losses)
        axes.plot(tokens, smoothed, color=TRAIN, linewidth=1.9, label=f"training loss, ends at {smoothed[-1]:.3f}")
    tokens, losses = curve(records, "eval_loss")
    if losses:
        label = f"held-out loss, ends at {losses[-1]:.3f}"
        axes.plot(tokens, losses, color=HELD_OUT, linewidth=1.2, marker="o", markersize=4.5, label=label, zorder=3)


def _draw_yardsticks(axes: Axes, yardsticks: Mapping[str, float]) -> None:
    for name, loss in yardsticks.items():
        axes.axhline(loss, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        # At the right edge, where the curves have left these lines behind.
        text = f"{name} {loss:.3f}"
        _note(axes, text, xy=(1, loss), xycoords=("axes fraction", "data"), offset=(-4, 3), align="right")


def _limit_loss_range(axes: Axes, records: Sequence[Record], yardsticks: Mapping[str, float]) -> None:
    """Show every loss, unless a few spikes would squeeze the curve: then the upper 0.5 % may leave the picture."""
    losses = sorted(curve(records, "loss")[1])
    if not losses:
        return
    shown = [losses[0], losses[int(0.995 * (len(losses) - 1))], smooth(curve(records, "loss")[1])[0]]
    shown += curve(records, "eval_loss")[1] + list(yardsticks.values())
    margin = 0.05 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _mark_phases(loss_axes: Axes, rate_axes: Axes, phases: Sequence[PhaseConfig]) -> None:
    """Draw a line where a phase begins and name it above; phases that the run has not reached are left out."""
    end_tokens = loss_axes.get_xlim()[1]
    reached = [phase for phase in phases if phase.start_tokens < end_tokens]
    if len(phases) < 2:
        return
    for number, phase in enumerate(reached, start=1):
        if number > 1:
            for axes in (loss_axes, rate_axes):
                axes.axvline(phase.start_tokens, color=INK, linewidth=1.0, linestyle=":")
        # With more than two there is no room for the weights.
        name = phase_name(number, phase) if len(reached) <= 2 else f"phase {number}"
        if len(reached) == 2 and phase.start_tokens > 0.6 * end_tokens:  # would leave the picture on the right
            _note(loss_axes, name, xy=(1, 1), xycoords=("axes fraction", "axes fraction"), offset=(0, 6), align="right")
        else:
            _note(loss_axes, name, xy=(phase.start_tokens, 1), xycoords=("data", "axes fraction"), offset=(0, 6))


def phase_name(number: int, phase: PhaseConfig) -> str:
    """Return e.g. "phase 2: code 70 %, prose 30 %", heaviest source first; many sources are cut to three."""
    total = sum(weight.weight for weight in phase.weights) or 1.0
    ranked = sorted(phase.weights, key=lambda weight: -weight.weight)
    parts = [f"{weight.source} {100 * weight.weight / total:.0f} %" for weight in ranked if weight.weight > 0]
    shown = ", ".join(parts[:3]) + (", …" if len(parts) > 3 else "")
    return f"phase {number}" + (f": {shown}" if shown else "")


def _note(
    axes: Axes,
    text: str,
    *,
    xy: tuple[float, float],
    xycoords: tuple[str, str],
    offset: tuple[float, float],
    align: Literal["left", "right"] = "left",
) -> None:
    axes.annotate(
        text,
        xy=xy,
        xycoords=xycoords,
        xytext=offset,
        textcoords="offset points",
        horizontalalignment=align,
        color=MUTED,
        fontsize=9,
    )
