"""Which checkpoints stay, and that a good one always does?"""

from pathlib import Path

import pytest

from nemotron_train.checkpoint.commit import COMMIT_FILE, newest_checkpoint, step_folder
from nemotron_train.checkpoint.retention import drop_old_checkpoints, sweep
from tests.checkpoint.test_commit import write_checkpoint

TOKENS = 256  # of a step of `write_checkpoint`


def steps_left(checkpoints: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoints.iterdir() if path.name[5:].isdigit())


@pytest.mark.parametrize(
    ("keep_last", "keep_every_steps", "left"),
    [
        (0, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (1, 0, [10]),
        (3, 0, [8, 9, 10]),
        (2, 4, [4, 8, 9, 10]),
        (1, 3, [3, 6, 9, 10]),
        (20, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
@pytest.mark.parametrize("after_each", [True, False])
def test_the_last_and_one_of_each_stretch_stay(
    tmp_path: Path, keep_last: int, keep_every_steps: int, left: list[int], after_each: bool
) -> None:
    """Fails if the rule is off by one, or its result depends on how often it is applied."""
    for step in range(1, 11):
        write_checkpoint(tmp_path, step)
        if after_each or step == 10:
            drop_old_checkpoints(tmp_path, keep_last, keep_every_steps * TOKENS)
    assert steps_left(tmp_path) == left
    assert {path.name for path in tmp_path.iterdir()} == {f"step_{step:09d}" for step in left}


def test_the_only_good_one_is_never_deleted(tmp_path: Path) -> None:
    """Fails if damaged checkpoints are counted among the last ones, or deleted: they may be all there is."""
    for step in range(1, 5):
        write_checkpoint(tmp_path, step)
    for step in (3, 4):
        (step_folder(tmp_path, step) / COMMIT_FILE).unlink()
    drop_old_checkpoints(tmp_path, 1, 0)
    assert steps_left(tmp_path) == [2, 3, 4]
    assert newest_checkpoint(tmp_path)[0] == step_folder(tmp_path, 2)


def test_what_killed_runs_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    """Fails if torn saves pile up, or a checkpoint or one that was moved aside goes with them."""
    kept = write_checkpoint(tmp_path, 1)
    names = ("step_000000002.tmp-1a", "step_000000003.deleting-5", "step_000000004.damaged-7", "notes")
    for name in names:
        (tmp_path / name / "part").mkdir(parents=True)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, "step_000000004.damaged-7", "notes"}
