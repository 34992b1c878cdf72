"""Where do a run's numbers and messages go? To `metrics.jsonl`, the console and wandb, behind one protocol.

The trainer builds one `Writers` on rank 0 with `build_writers` and calls `write` once per logged step.
A source's name may hold any text; every other name comes from `metrics.METRICS`.
"""

from pathlib import Path
from typing import Protocol

from rich.console import Console

from nemotron_train.config.schema import RunConfig, WandbMode
from nemotron_train.observe.console_writer import ConsoleWriter
from nemotron_train.observe.jsonl_writer import JsonlWriter
from nemotron_train.observe.metrics import Record, check_record
from nemotron_train.observe.wandb_writer import WandbWriter


class Writer(Protocol):
    """One place that numbers and messages go to."""

    def write(self, record: Record) -> None:
        """Take the numbers of one step; a second record of the same step adds to the first."""

    def event(self, text: str) -> None:
        """Take a message for people: resumed, checkpoint saved, stopped by a signal."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class Writers:
    """Several writers behind the protocol of one; refuses records that the metrics table does not explain."""

    def __init__(self, writers: list[Writer]) -> None:
        self._writers = writers

    def write(self, record: Record) -> None:
        check_record(record)
        for writer in self._writers:
            writer.write(record)

    def event(self, text: str) -> None:
        for writer in self._writers:
            writer.event(text)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def build_writers(config: RunConfig, *, num_steps: int, resume_step: int, console: Console | None = None) -> Writers:
    """Build what `config.log` asks for.

    Args:
        num_steps: steps of the whole run, for the progress bar.
        resume_step: steps already taken; 0 for a new run. Lines of `metrics.jsonl` beyond it are dropped.
        console: standard output when not given.
    Raises:
        ConfigError: `log.wandb` is on and wandb is not installed.
    """
    run_dir = Path(config.run.dir)
    writers: list[Writer] = [
        JsonlWriter(run_dir / "metrics.jsonl", resume_step=resume_step),
        ConsoleWriter(num_steps=num_steps, resume_step=resume_step, console=console),
    ]
    if config.log.wandb is not WandbMode.off:
        writers.append(WandbWriter(config, run_dir))
    return Writers(writers)
