"""What has the model read, and where is it? `consumption.jsonl` in the run folder, one line a step.

Which tokens a step takes follows from the plan of the data, so a line needs a few numbers only: the samples of the
step, how far each source was read, and the hash of the plan's past, which is the same in every run that read the same.
`python -m data_tools show --step N` turns a step back into text. Lines are only ever appended: a run that went back to
a checkpoint writes its steps again, and the last line of a step counts.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from nemotron_train.data.blend import BlendPlan
from nemotron_train.data.source import Source
from nemotron_train.errors import DataError

NAME = "consumption.jsonl"


def samples_of_step(run_dir: Path, step: int) -> tuple[range, int, str] | None:
    """Return the samples that a step of a run took, the tokens consumed after it and the hash of the plan's past there;
    None if the ledger does not have the step.

    Raises:
        DataError: a line is damaged.
    """
    found = None
    path = run_dir / NAME
    if not path.exists():
        return None
    with path.open(encoding="utf-8", errors="replace") as lines:  # of millions of steps: one at a time
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while it wrote
            match entry:
                case {
                    "step": int(at),
                    "samples": [int(first), int(end)],
                    "tokens": [_, int(after)],
                    "past_hash": str(past_hash),
                }:
                    found = (range(first, end), after, past_hash) if at == step else found
                case {"begins_after_step": _}:
                    pass
                case _:
                    raise DataError(f"{path}, line {number}: {line.strip()[:80]} accounts for no step. Take it out.")
    return found


class ConsumptionLedger:
    def __init__(self, run_dir: Path, blend: BlendPlan) -> None:
        self._path = run_dir / NAME
        self._blend = blend
        self._may_be_torn = True  # the last line, by a kill or a full disk while it was written

    def begin(self, step: int, sources: Sequence[Source]) -> None:
        """Say which data the steps after `step` read."""
        facts = {
            source.name: {"tokens": source.num_tokens, "shards": len(source.shards), "content": source.identity}
            for source in sources
        }
        self._append({"begins_after_step": step, "sources": facts})

    def write(self, step: int, tokens_before: int, tokens_after: int) -> None:
        """Account for a step."""
        first, end = self._blend.sample_at(tokens_before), self._blend.sample_at(tokens_after)
        line = {
            "step": step,
            "tokens": [tokens_before, tokens_after],
            "samples": [first, end],
            "read": {name: tokens for name, tokens in self._blend.tokens_read(end).items() if tokens},
            "past_hash": self._blend.past_hash(tokens_after),
        }
        self._append(line)

    def _append(self, line: dict) -> None:
        if self._may_be_torn:
            self._end_line()
        self._may_be_torn = True
        with self._path.open("a", encoding="utf-8") as file:  # opened anew: it may be on a network that comes and goes
            file.write(json.dumps(line) + "\n")
        self._may_be_torn = False

    def _end_line(self) -> None:
        """End what was left of a line, so that the next one is not lost with it."""
        if self._path.exists():
            with self._path.open("rb+") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read(1) not in (b"", b"\n"):
                    file.write(b"\n")
