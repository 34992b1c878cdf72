"""What does a person at the console see of a run: a progress bar on a terminal, plain lines anywhere else?

Lines are for files and CI logs: the first step, then one every ten seconds, every evaluation and the last step.
On a terminal the bar stays at the bottom, evaluations and messages scroll by above it.
"""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from nemotron_train.observe.metrics import Record, check_record

LINE_INTERVAL_SECONDS = 10.0
EVAL_LOSS = "eval_loss"


class ConsoleWriter:
    """Shows progress on a rich console; writes to it only between construction and `close`."""

    def __init__(
        self,
        *,
        num_steps: int,
        resume_step: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._num_steps = num_steps
        self._resume_step = resume_step
        self._clock = clock
        self._last_line: float | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def write(self, record: Record) -> None:
        check_record(record)
        if self._console.is_interactive:
            self._advance_bar(record)
            if EVAL_LOSS in record:
                self.event(f"step {record['step']}/{self._num_steps} | {_held_out(record)}")
        elif self._is_line_due(record):
            self._last_line = self._clock()
            self.event(f"step {record['step']}/{self._num_steps} | {_numbers(record)}")

    def event(self, text: str) -> None:
        # Not wrapped, coloured or read as markup: a log line is one line, whatever a path in it looks like.
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _is_line_due(self, record: Record) -> bool:
        if self._last_line is None or EVAL_LOSS in record or record["step"] == self._num_steps:
            return True
        return self._clock() - self._last_line >= LINE_INTERVAL_SECONDS

    def _advance_bar(self, record: Record) -> None:
        if "loss" not in record:  # an evaluation alone
            return
        if self._bar is None:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
            self._bar = Progress(TextColumn("training"), *columns, console=self._console, expand=True)
            self._task = self._bar.add_task("", total=self._num_steps, completed=self._resume_step, numbers="")
            self._bar.start()
        numbers = _numbers(record, brief=True)
        self._bar.update(self._task, completed=float(record["step"] or 0), numbers=numbers)


def _numbers(record: Record, *, brief: bool = False) -> str:
    """Return the parts a person follows; `brief` leaves out what would not fit beside a bar."""
    formats: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("consumed_tokens", lambda x: f"{short_count(x)} tokens"),
        ("loss", lambda x: f"loss {x:.4f}"),
        ("grad_norm", lambda x: "" if brief else f"gradient norm {x:.3f}"),
        ("learning_rate", lambda x: "" if brief else f"rate {x:.2e}"),
        ("tokens_per_second_per_gpu", lambda x: f"{short_count(x)} tokens/s per rank"),
        ("model_tflops_per_gpu", lambda x: "" if brief else f"{x:.3g} TFLOP/s per rank"),
        ("skipped_steps", lambda x: f"{x:.0f} steps skipped" if x else ""),
        ("seconds_left", lambda x: f"{clock_time(x)} left"),
    )
    values = ((record.get(name), show) for name, show in formats)
    parts = [show(value) for value, show in values if value is not None]
    if EVAL_LOSS in record and not brief:
        parts.append(_held_out(record))
    return " | ".join(part for part in parts if part)


def _held_out(record: Record) -> str:
    """Return the held-out loss with that of each source in brackets."""
    prefix = EVAL_LOSS + "/"
    sources = [f"{name.removeprefix(prefix)} {x:.4f}" for name, x in record.items() if name.startswith(prefix) and x]
    total = record[EVAL_LOSS]
    text = "held-out loss " + ("not finite" if total is None else f"{total:.4f}")
    return f"{text} ({', '.join(sources)})" if sources else text


def short_count(count: float) -> str:
    """Return a count in three digits: 1,234,567 as 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def clock_time(seconds: float) -> str:
    """Return a duration as 0:07, 12:34 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
