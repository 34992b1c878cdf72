"""A save that fails costs no training and hangs no rank; the next one works."""

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nemotron_train.checkpoint import saver as saver_module
from nemotron_train.checkpoint.commit import newest_checkpoint, step_folder
from nemotron_train.checkpoint.retention import drop_old_checkpoints
from nemotron_train.checkpoint.saver import Saver
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.run_data import open_run_data
from nemotron_train.engine.agreement import any_rank_each, from_rank_zero
from nemotron_train.errors import CheckpointError
from nemotron_train.runtime import Runtime
from tests.checkpoint.saved_runs import fill, filled_step, progress_at, saver_of, tiny_config, trainer_of
from tests.engine.live import live_run
from tests.ranks import RankPool

TP2 = {"tensor_parallel_size": 2, "sequence_parallel": True}  # both ranks write


@contextmanager
def small_files_only(rank: int) -> Iterator[None]:
    """On one rank a file cannot grow beyond 20,000 bytes; writing fails as on a full disk."""
    if dist.get_rank() != rank:
        yield
        return
    ignored, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, ignored)


@contextmanager
def file_in_the_way(run_dir: Path) -> Iterator[None]:
    """The folder of checkpoints is a file: nothing can be made in it."""
    checkpoints = run_dir / "checkpoints"
    from_rank_zero(lambda: (checkpoints.rename(run_dir / "aside"), checkpoints.write_text("in the way"), None)[-1])
    yield
    from_rank_zero(lambda: (checkpoints.unlink(), (run_dir / "aside").rename(checkpoints), None)[-1])


@contextmanager
def vanished(run_dir: Path) -> Iterator[None]:
    """The run folder is gone, as when a file system is unmounted."""
    aside = run_dir.with_name("aside")
    from_rank_zero(lambda: (run_dir.rename(aside), None)[-1])
    yield
    assert dist.get_rank() or not run_dir.exists(), "nothing may be written to what lies beneath a mount"
    from_rank_zero(lambda: (aside.rename(run_dir), None)[-1])


FAILURES: dict[str, Callable[[Path], Any]] = {
    "full disk on rank 0": lambda run_dir: small_files_only(0),
    "full disk on rank 1": lambda run_dir: small_files_only(1),
    "file in the way": file_in_the_way,
    "vanished": vanished,
}


def take_step(run: Runtime, saver: Saver, step: int, *, is_due: bool) -> None:
    """What the trainer does after a step that gave the state the values of `step`."""
    fill(run, step)
    is_busy, retry = any_rank_each(saver.signals(), run.platform.device)
    saver.after_step(progress_at(step), is_busy=is_busy, is_due=is_due or retry)


def finish_writing(run: Runtime, saver: Saver, step: int) -> int:
    """Take steps until no save is under way; returns the last."""
    while saver._beside:
        step += 1
        take_step(run, saver, step, is_due=False)
    return step


def save_through_failures(config: RunConfig, failures: list[str]) -> list[str]:
    """Save, save under each failure, and save again each time; returns what did not go as it should on this rank."""
    run_dir, wrong = Path(config.run.dir), []
    checkpoints = run_dir / "checkpoints"
    saver_module.FIRST_PAUSE_SECONDS = 1e6  # no retry in between
    run_dir.mkdir(exist_ok=True)
    with live_run(config) as run:
        data, events = open_run_data(config), []
        saver, step = saver_of(run, data, events), 1
        take_step(run, saver, step, is_due=True)
        step = finish_writing(run, saver, step)
        for name in failures:
            before = {path.name for path in checkpoints.iterdir()}
            dist.barrier()
            with FAILURES[name](run_dir):
                events.clear()
                step += 1
                take_step(run, saver, step, is_due=True)
                step = finish_writing(run, saver, step)
                alarm = [event for event in events if event.startswith("CHECKPOINT NOT SAVED")]
                if dist.get_rank() == 0 and len(alarm) != 1:
                    wrong.append(f"{name}: {events}")
            if {path.name for path in checkpoints.iterdir()} != before:
                wrong.append(f"{name}: left {[path.name for path in checkpoints.iterdir()]}")
            dist.barrier()
            step += 1
            due = step
            take_step(run, saver, step, is_due=True)
            step = finish_writing(run, saver, step)
            if newest_checkpoint(checkpoints) != (step_folder(checkpoints, due), []):
                wrong.append(f"{name}: the next save did not work: {events}")
            fill(run, 99_999)
            if trainer_of(run, data).resume().step != due or filled_step(run) != due:
                wrong.append(f"{name}: step {due} was saved, {filled_step(run)} is in it")
    return wrong


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_is_reported_and_the_next_one_works(
    ranks: RankPool, corpus: Path, tmp_path: Path, asynchronous: bool
) -> None:
    """Fails if a rank hangs or dies because one cannot write, temporary data stays, nobody is told, a later save does
    not work, or a checkpoint holds another step's values than its own."""
    config = tiny_config(corpus, tmp_path / "run", parallel=TP2, asynchronous=asynchronous)
    assert ranks.run(save_through_failures, 2, config, list(FAILURES)) == [[], []]


def save_last_through_failures(config: RunConfig) -> list[str]:
    said = []
    saver_module.LAST_PAUSES_SECONDS = (0.01, 0.01)
    with live_run(config) as run:
        data, events = open_run_data(config), []
        saver = saver_of(run, data, events)
        fill(run, 1)
        with small_files_only(1):
            try:
                saver.save_last(progress_at(1))
            except CheckpointError as error:
                said.append(str(error))
        saver.save_last(progress_at(1))
        said += events
    return said


def test_the_last_save_fails_the_run_on_every_rank(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a run whose last state could not be written ends as if it had been, or one rank alone knows."""
    for error, saved in ranks.run(save_last_through_failures, 2, tiny_config(corpus, tmp_path, parallel=TP2)):
        assert "Cannot write the checkpoint of step 1" in error
        assert "rank 1: OSError: [Errno 27] File too large" in error
        assert saved == f"Saved {step_folder(tmp_path / 'checkpoints', 1)}"


def retry_and_kill_writers(config: RunConfig) -> list[str]:
    saver_module.FIRST_PAUSE_SECONDS = 0.02
    with live_run(config) as run:
        data, events = open_run_data(config), []
        saver = saver_of(run, data, events)
        fill(run, 1)
        saver.after_step(progress_at(1), is_busy=False, is_due=True)
        os.kill(saver._beside.writer.pid, signal.SIGKILL)
        step = finish_writing(run, saver, 1)
        while not any(event.startswith("Saved") for event in events):
            step += 1
            take_step(run, saver, step, is_due=False)  # nothing is due but the second attempt
            time.sleep(0.005)
        return [*events, "saves again" if saver._beside else "done"]


def test_a_killed_writer_is_a_failed_save_and_is_tried_again(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if the end of the writer process ends training, passes as a success, or waits for the next due save; or the
    next step takes the attempt that is under way for due still, waits for it and saves a second time."""
    *events, last = ranks.run(retry_and_kill_writers, 1, tiny_config(corpus, tmp_path, asynchronous=True))[0]
    assert "the writer process ended with exit code -9" in events[0]
    assert "Saved" in events[-1]
    assert last == "done"


def save_while_deleting(config: RunConfig) -> list[str]:
    """Take two saves; deleting is held up until the second is done."""
    let_go, seen = threading.Event(), []

    def held_up(*arguments: Any) -> None:
        seen.append("training went on" if let_go.wait(20) else "training waited")
        drop_old_checkpoints(*arguments)

    saver_module.drop_old_checkpoints = held_up
    try:
        with live_run(config) as run:
            saver = saver_of(run, open_run_data(config), [])
            saver.after_step(progress_at(1), is_busy=False, is_due=True)
            let_go.set()
            saver.save_last(progress_at(2))
    finally:
        saver_module.drop_old_checkpoints = drop_old_checkpoints
    return [*seen, *(path.name for path in (Path(config.run.dir) / "checkpoints").iterdir())]


def test_training_does_not_wait_while_old_checkpoints_are_deleted(
    ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """Fails if a save holds training up until thousands of old files are gone, or a run ends before they are."""
    found = ranks.run(save_while_deleting, 1, tiny_config(corpus, tmp_path, keep_last=1))[0]
    assert found == ["training went on", "training went on", "step_000000002"]


def save_on_small_disk(config: RunConfig) -> list[str]:
    with live_run(config) as run:
        data, events = open_run_data(config), []
        saver = saver_of(run, data, events)
        for step in range(1, 6):
            fill(run, step)
            saver.after_step(progress_at(step), is_busy=False, is_due=True)
        return [*events, *(path.name for path in (Path(config.run.dir) / "checkpoints").iterdir())]


def test_a_full_file_system_keeps_what_is_on_it(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a save that runs out of space harms an older checkpoint, or its parts stay and keep the disk full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        *events, name = ranks.run(save_on_small_disk, 1, tiny_config(corpus, disk))[0]
        assert name == "step_000000001"
        assert events[0].startswith("Saved")
        assert len(events) == 5
        assert all("No space left on device" in event for event in events[1:])
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
