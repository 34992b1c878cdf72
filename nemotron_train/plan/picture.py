"""What will the run do, in one picture? Learning rate, tokens of a step and blend over the tokens trained on.

Drawn from the plan alone. Figures are objects, without pyplot's global state.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from nemotron_train.plan.chart_style import INK, MUTED, RATE, style_axes, write_png
from nemotron_train.plan.run_plan import RunPlan

BATCH = "#2f6fb5"
# Neighbours differ in lightness as well as in hue.
SOURCES = (
    "#1f4e79", "#7fb3d5", "#a84632", "#f0b27a", "#3a7d5d", "#a9d18e", "#5b3a8c",
    "#c39bd3", "#8a6d1b", "#f7dc6f", "#4a4f57", "#b2babb", "#0e7c86", "#e8a0bf",
)  # fmt: skip
POINTS = 600  # of the learning-rate curve


def draw_plan(plan: RunPlan, path: Path) -> None:
    """Write the picture as PNG; a picture that is there is replaced in one step."""
    write_png(build_figure(plan), path)


def build_figure(plan: RunPlan) -> Figure:
    """Return the figure with its three panels: rate, batch, blend."""
    figure = Figure(figsize=(9.6, 7.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rate, batch, blend = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.2, 3])
    for axes in (rate, batch, blend):
        style_axes(axes)
    _draw_rate(rate, plan)
    _draw_batch(batch, plan)
    _draw_blend(blend, plan)
    for phase in plan.config.data.phases[1:]:
        for axes in (rate, batch, blend):
            axes.axvline(phase.start_tokens, color=INK, linewidth=1.0, linestyle=":")
    rate.set_title(plan.config.run.name, loc="left", color=INK, fontsize=13, fontweight="bold")
    blend.set_xlabel("tokens trained on", color=INK)
    blend.xaxis.set_major_formatter(EngFormatter(sep=""))
    blend.set_xlim(0, plan.config.train.train_tokens)
    figure.align_ylabels()
    return figure


def _draw_rate(axes: Axes, plan: RunPlan) -> None:
    lr, end = plan.config.lr, plan.config.train.train_tokens
    tokens = {round(end * point / POINTS) for point in range(POINTS + 1)}
    # The corners of the curve, which even steps would cut.
    tokens |= {lr.warmup_tokens, end - (lr.decay_tokens or 0)}
    ordered = sorted(tokens)
    axes.plot(ordered, [plan.learning_rate_at(at) for at in ordered], color=RATE, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate", color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))


def _draw_batch(axes: Axes, plan: RunPlan) -> None:
    segments, end = plan.batches.segments, plan.config.train.train_tokens
    edges = [*(segment.start_tokens for segment in segments), end]
    axes.stairs([segment.tokens_per_step for segment in segments], edges, color=BATCH, linewidth=1.8, baseline=None)
    axes.set_ylim(0, 1.25 * max(segment.tokens_per_step for segment in segments))
    axes.set_ylabel("tokens a step", color=INK)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    for segment in segments:
        text = f"{segment.global_batch_size} x {segment.seq_length:,}"
        axes.annotate(
            text, (segment.start_tokens, segment.tokens_per_step), xytext=(4, -12), textcoords="offset points",
            color=MUTED, fontsize=9,
        )  # fmt: skip


def _draw_blend(axes: Axes, plan: RunPlan) -> None:
    phases, end = plan.config.data.phases, plan.config.train.train_tokens
    edges = [*(phase.start_tokens for phase in phases), end]
    below = [0.0] * len(phases)
    for number, source in enumerate(source.name for source in plan.config.data.sources):
        shares = []
        for phase in phases:
            weights = {weight.source: weight.weight for weight in phase.weights}
            shares.append(weights.get(source, 0.0) / sum(weights.values()))
        above = [low + share for low, share in zip(below, shares, strict=True)]
        axes.stairs(above, edges, baseline=below, fill=True, color=SOURCES[number % len(SOURCES)], label=source)
        below = above
    axes.set_ylim(0, 1)
    axes.set_ylabel("blend", color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9,
        labelcolor=INK,
    )  # fmt: skip
