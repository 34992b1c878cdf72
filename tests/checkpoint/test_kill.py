"""kill -9 at random moments of saving, again and again in one run folder: every start goes on from a whole
checkpoint."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.checkpoint.saver import Saver
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.run_data import open_run_data
from tests.checkpoint.saved_runs import fill, filled_step, progress_at, tiny_config, trainer_of
from tests.engine.live import live_run

# Each run is forked from a process that has imported everything and started nothing.
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["tests.checkpoint.saved_runs"])


def resume_and_save_for_ever(config: RunConfig, report: Connection) -> None:
    """A run that does nothing but save: it tells what it resumed from and what it has saved, until it is killed."""
    with live_run(config) as run:
        data = open_run_data(config)
        step = trainer_of(run, data).resume().step
        report.send(("resumed", step, step == 0 or filled_step(run) == step))
        saver = Saver(run, data.blend, lambda text: report.send(("saved", text)))
        while True:
            step += 1
            fill(run, step)
            saver.after_step(progress_at(step), is_busy=False, is_due=True)
            while saver._beside:
                fill(run, step + 1_000_000)  # training goes on while the writer is at work
                saver.after_step(progress_at(step + 1), is_busy=saver.signals()[0], is_due=False)


def kill_again_and_again(config: RunConfig, kills: int, seed: int) -> dict[str, Any]:
    """Start, kill at a random moment, start again; returns what went wrong and how it went."""
    chance = random.Random(seed)
    saved, wrong, torn, seconds = 0, [], 0, 0.0
    checkpoints = Path(config.run.dir) / "checkpoints"
    for kill in range(kills + 1):
        receiver, sender = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=resume_and_save_for_ever, args=(config, sender))
        process.start()
        sender.close()
        try:
            _, step, is_whole = receiver.recv()
        except EOFError:
            wrong.append(f"start {kill} failed; {saved} was saved")
            break
        if not is_whole or not saved <= step <= saved + 1:
            wrong.append(f"start {kill} resumed step {step} (whole: {is_whole}); {saved} was saved")
        saved = step
        if kill == 0:  # how long a save takes here
            began = time.monotonic()
            receiver.recv(), receiver.recv()
            seconds, saved = (time.monotonic() - began) / 2, saved + 2
        time.sleep(chance.uniform(0, 2 * seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while receiver.poll():
                receiver.recv()
                saved += 1
        except EOFError:
            pass
        torn += any(".tmp" in path.name for path in checkpoints.iterdir())
    return {"wrong": wrong, "torn": torn, "saved": saved, "left": len(list(checkpoints.iterdir()))}


def check(config: RunConfig, kills: int) -> None:
    found = kill_again_and_again(config, kills, seed=7)
    assert found["wrong"] == []
    assert found["torn"] >= kills // 4  # else the kills missed what they are to hit
    assert found["left"] <= 5  # two whole ones, one that became whole unseen, one torn, one half deleted


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_killed_save_loses_at_most_itself(corpus: Path, tmp_path: Path, asynchronous: bool) -> None:
    """Fails if a torn checkpoint is loaded, a committed one lost, a hand is needed, or a save beside training takes
    values of a later step."""
    check(tiny_config(corpus, tmp_path, asynchronous=asynchronous, keep_last=2), 4)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_hundred_killed_saves_lose_at_most_themselves(corpus: Path, tmp_path: Path, asynchronous: bool) -> None:
    """Fails like the test above, on one of a hundred moments."""
    check(tiny_config(corpus, tmp_path, asynchronous=asynchronous, keep_last=2), 100)
