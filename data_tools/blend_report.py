"""What does an experiment read? Sources, weights, tokens and epochs by phase, as a table, as JSON, or as a picture."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table

from data_tools.console import plain_console
from data_tools.experiment import load_experiment
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.open_sources import build_plan, open_data
from nemotron_train.plan.batching import plan_batches
from nemotron_train.plan.chart_style import write_png

LEGEND_ROWS = 20


def describe_blend(config: RunConfig) -> dict[str, Any]:
    """Return tokens there are and tokens read, of every source in every phase.

    Raises:
        ConfigError, DataError: the sources cannot be opened, or the phases are impossible with them.
    """
    training = open_data(config.data, config.model.vocab_size, config.train.seq_length).training
    blend = build_plan(config.data, training, config.train.seq_length, config.run.seed)
    total = plan_batches(config.train, config.data.phases, 1).consumed_at_end
    epochs = blend.epochs(total)
    starts = [*(phase.start_tokens for phase in config.data.phases), total]
    phases = []
    for number, phase in enumerate(config.data.phases):
        weights = {share.source: share.weight for share in phase.weights}
        phases.append(
            {
                "start_tokens": phase.start_tokens,
                "end_tokens": max(phase.start_tokens, min(starts[number + 1], total)),
                "seq_length": phase.seq_length or config.train.seq_length,
                "weights": {name: weight / sum(weights.values()) for name, weight in weights.items()},
                "epochs": {name: by_phase[number] for name, by_phase in epochs.items()},
            }
        )
    return {
        "experiment": config.run.name,
        "train_tokens": total,
        "max_epochs": config.data.max_epochs,
        "sources": {
            source.name: {
                "tokens": source.num_tokens,
                "shards": len(source.shards),
                "epochs": sum(epochs[source.name]),
                "tokens_read": round(sum(epochs[source.name]) * source.num_tokens),
            }
            for source in training
        },
        "phases": phases,
    }


def table_of(report: dict[str, Any]) -> Table:
    """Return one row a source."""
    table = Table("source", "shards", "tokens", *(f"phase {n}" for n in range(len(report["phases"]))), "read", "epochs")
    for name, source in report["sources"].items():
        by_phase = [
            f"{phase['weights'].get(name, 0.0):.1%}, {phase['epochs'][name]:.2f} epochs" for phase in report["phases"]
        ]
        epochs = f"{source['epochs']:.2f}" + (" (!)" if source["epochs"] > report["max_epochs"] else "")
        table.add_row(
            name, str(source["shards"]), f"{source['tokens']:,}", *by_phase, f"{source['tokens_read']:,}", epochs
        )
    return table


def warnings_of(report: dict[str, Any]) -> list[str]:
    return [
        f"{name} is read {source['epochs']:.2f} times, more than data.max_epochs={report['max_epochs']}: training "
        "would refuse."
        for name, source in report["sources"].items()
        if source["epochs"] > report["max_epochs"]
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the share of every source over the tokens of the run, the sources named in the order of the bars."""
    names = list(report["sources"])
    columns = -(-len(names) // LEGEND_ROWS)
    figure = Figure(figsize=(7 + 2 * columns, 4 + 0.1 * min(len(names), LEGEND_ROWS)), layout="constrained")
    axes = figure.subplots()
    few = len(names) <= 10
    colors = colormaps["tab10"](np.arange(10)) if few else colormaps["turbo"](np.linspace(0.05, 0.95, len(names)))
    phases = [phase for phase in report["phases"] if phase["end_tokens"] > phase["start_tokens"]]
    starts = np.array([phase["start_tokens"] for phase in phases])
    widths = np.array([phase["end_tokens"] for phase in phases]) - starts
    below = np.zeros(len(phases))
    for name, color in zip(names, colors, strict=False):
        shares = np.array([phase["weights"].get(name, 0.0) for phase in phases])
        style: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.5}
        axes.bar(starts, shares, width=widths, bottom=below, color=color, label=name, **style)
        below += shares
    axes.set(xlim=(0, report["train_tokens"]), ylim=(0, 1), xlabel="tokens of the run", ylabel="share of the tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(f"What {report['experiment']} reads", loc="left", fontweight="bold")
    figure.legend(loc="outside right upper", frameon=False, reverse=True, ncols=columns)
    write_png(figure, path)


def run(arguments: argparse.Namespace) -> None:
    report = describe_blend(load_experiment(arguments.overrides))
    if arguments.json:
        plain_console().print(json.dumps(report, indent=1))
    else:
        plain_console().print(table_of(report))
    for warning in warnings_of(report):
        plain_console(stderr=True).print(f"warning: {warning}", style="yellow")
    if arguments.png is not None:
        draw(report, arguments.png)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="+", metavar="experiment=NAME", help="and key=value ...")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the mixture over the run")
