"""How does `metrics.jsonl` stay one object per step through kills, resumes and second records of a step?

The file is mended when it is opened: a torn last line (kill -9 while writing) and lines beyond the step that training
resumes from are dropped, through a rename, so that a curve has one value a step. Numbers that are not finite become
null: JSON has no NaN.
"""

import json
import logging
import math
import os
from pathlib import Path

from nemotron_train.observe.metrics import Record, check_record

log = logging.getLogger(__name__)


class JsonlWriter:
    """Appends one line per step and hands it to the operating system at once. Steps only rise."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Open `path` for a run that has taken `resume_step` steps (0: start the file anew)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_records(path) if record["step"] <= resume_step] if resume_step else []
        _replace(path, b"".join(_line(record) for record in kept))
        self._last: dict[str, int | float | None] = kept[-1] if kept else {}
        self._last_step: int = kept[-1]["step"] if kept else -1
        # Unbuffered: a line reaches the operating system in one write, so only a crash inside that call can tear it.
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (closed by close())
        self._end = self._file.seek(0, os.SEEK_END)
        self._last_start = self._end - (len(_line(self._last)) if kept else 0)

    def write(self, record: Record) -> None:
        """Append the record; one of the last line's step is merged into that line.

        Raises:
            ValueError: a name is not in the metrics table, or the step lies before the last line's.
        """
        step = check_record(record)
        if step > self._last_step:
            self._last, self._last_start, self._last_step = dict(record), self._end, step
        elif step == self._last_step:
            self._last |= record
        else:
            raise ValueError(f"step {step} comes after step {self._last_step} in {self._file.name}")
        line = _line(self._last)
        self._file.seek(self._last_start)
        if self._file.write(line) != len(line):  # a full disk may take a part without an error
            raise OSError(f"{self._file.name}: only a part of step {step}'s line was written. Is the disk full?")
        self._end = self._last_start + len(line)
        self._file.truncate(self._end)

    def event(self, text: str) -> None:
        """Messages are for people; this file holds numbers only."""

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict]:
    """Read `metrics.jsonl` as any crash may leave it: whole lines only, the last one of each step, in step order."""
    if not path.exists():
        return []
    records: dict[int, dict] = {}
    num_damaged = 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            num_damaged += 1
    if num_damaged:
        log.warning("%s: left out %d damaged line(s), e.g. from a kill while writing", path, num_damaged)
    return [records[step] for step in sorted(records)]


def _line(record: Record) -> bytes:
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def _replace(path: Path, content: bytes) -> None:
    """Give the file this content in one step: a crash leaves the old file or the new one."""
    if path.exists() and path.read_bytes() == content:
        return
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
