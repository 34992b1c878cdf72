"""metrics.jsonl holds one valid object a step, whatever happened to the process that wrote it."""

import json
import math
from pathlib import Path

import pytest

from nemotron_train.observe.jsonl_writer import JsonlWriter, read_records


def write_steps(path: Path, steps: range, *, resume_step: int, loss: float = 1.0) -> None:
    writer = JsonlWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write({"step": step, "loss": loss + step / 3})
    writer.close()


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_line_can_be_read_by_others_as_soon_as_it_is_written(tmp_path: Path) -> None:
    """Fails if a line waits in a buffer: a kill would lose it."""
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=0)
    for step in range(1, 4):
        writer.write({"step": step, "loss": 0.1})
        assert steps_in(path) == list(range(1, step + 1))
    writer.close()


def test_after_a_resume_the_lines_of_the_lost_steps_are_replaced(tmp_path: Path) -> None:
    """Fails if steps beyond the checkpoint stay, so that a step has two values, or earlier steps are lost."""
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 9), resume_step=0, loss=1.0)
    write_steps(path, range(6, 11), resume_step=5, loss=2.0)
    assert steps_in(path) == list(range(1, 11))
    losses = [record["loss"] for record in read_records(path)]
    assert losses == [1.0 + step / 3 for step in range(1, 6)] + [2.0 + step / 3 for step in range(6, 11)]


def test_a_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    """Fails if lines of an earlier run in the same folder stay."""
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 5), resume_step=0)
    write_steps(path, range(1, 3), resume_step=0)
    assert steps_in(path) == [1, 2]


@pytest.mark.parametrize("lost_bytes", [1, 2, 9, 20])
def test_a_torn_last_line_is_mended(tmp_path: Path, lost_bytes: int) -> None:
    """Fails if the rest of a torn line stays and swallows the next line, or takes whole lines with it."""
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 5), resume_step=0)
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    write_steps(path, range(5, 7), resume_step=4)
    kept = [1, 2, 3, 4] if lost_bytes == 1 else [1, 2, 3]  # without its newline the line is still whole
    assert steps_in(path) == [*kept, 5, 6]


def test_an_evaluation_of_the_last_step_joins_its_line(tmp_path: Path) -> None:
    """Fails if a step gets two lines, also when the evaluation comes from the process that resumed."""
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 3), resume_step=0)
    writer = JsonlWriter(path, resume_step=2)
    writer.write({"step": 2, "eval_loss": 7.5})
    writer.write({"step": 3, "loss": 3.0})
    writer.write({"step": 3, "loss": 12345.678, "eval_loss": 7.25})
    writer.write({"step": 3, "loss": 2.0})  # a shorter line than the one it replaces
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1 + 1 / 3},
        {"step": 2, "loss": 1 + 2 / 3, "eval_loss": 7.5},
        {"step": 3, "loss": 2.0, "eval_loss": 7.25},
    ]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Fails if NaN or Infinity is written: neither is JSON, and strict readers refuse the file."""
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=0)
    writer.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.5})
    writer.close()
    expected = {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.5}
    assert json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word)) == expected


def test_a_step_that_goes_back_is_refused(tmp_path: Path) -> None:
    """Fails if the file could lose its order."""
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=0)
    writer.write({"step": 5, "loss": 1.0})
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        writer.write({"step": 4, "loss": 1.0})
    writer.close()
