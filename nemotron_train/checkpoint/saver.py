"""When is a checkpoint written, beside training or before it goes on, and what happens when that fails?

A periodic save that fails is reported, and tried again with the state of a later step, after a pause that doubles: a
disk that is full or gone for a while costs no training. The last save of a run, at its end or before a stop, is tried
a few times and then fails the run.

All ranks call the same methods at the same steps; what differs between ranks (a clock, a writer that is done) goes
through the reduction that ends every step, see `signals`.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from nemotron_train.checkpoint.background import BackgroundWriter
from nemotron_train.checkpoint.resume import checkpoints_folder
from nemotron_train.checkpoint.retention import drop_old_checkpoints
from nemotron_train.checkpoint.store import StartedSave, commit_save, finish_save, gather_reports, start_save
from nemotron_train.checkpoint.torch_dist import AgreedPlan
from nemotron_train.data.blend import BlendPlan
from nemotron_train.engine.agreement import from_rank_zero
from nemotron_train.errors import CheckpointError
from nemotron_train.runtime import Progress, Runtime

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 600.0  # before a failed periodic save is tried again
_NEVER = float("inf")
LAST_PAUSES_SECONDS = (1.0, 5.0, 20.0)  # between the attempts at the last save


@dataclass
class _SaveBeside:
    """A save beside training: every rank's writer writes, then a thread of rank 0 commits."""

    started: StartedSave
    writer: BackgroundWriter | None  # None: all ranks have written
    commit: Future[Path] | None = None  # on rank 0, when all ranks have written

    @property
    def is_busy(self) -> bool:
        if self.writer is not None:
            return self.writer.is_writing
        return self.commit is not None and not self.commit.done()


class Saver:
    """The checkpoints of a run. At most one is being written."""

    def __init__(self, run: Runtime, blend: BlendPlan, event: Callable[[str], None]) -> None:
        """Args:
        blend: says what decided the samples up to a save.
        event: takes a message for people.
        """
        self._run, self._blend, self._event = run, blend, event
        self._config = run.plan.config.checkpoint
        self._checkpoints = checkpoints_folder(run.plan.config)
        self._saved_step: int | None = None  # the last save of this process
        self._beside: _SaveBeside | None = None
        self._committer = ThreadPoolExecutor(1)  # on rank 0: commits what all ranks wrote, and deletes old checkpoints
        self._agreed: AgreedPlan | None = None  # in the first save
        self._pause, self._retry_at = FIRST_PAUSE_SECONDS, _NEVER

    def signals(self) -> tuple[bool, bool]:
        """What this rank has to tell the others after a step: it is still busy saving; a failed save is due again."""
        return (
            self._beside is not None and self._beside.is_busy,
            dist.get_rank() == 0 and time.monotonic() >= self._retry_at,
        )

    def after_step(self, progress: Progress, *, is_busy: bool, is_due: bool) -> None:
        """Take a save beside training a stage further if all ranks are done with the last, and save if it is time to.

        Args:
            is_busy: any rank is still busy.
            is_due: by the number of the step, or because a failed save is to be tried again.
        """
        if self._beside and not is_busy:
            self._next_stage(self._beside)
        if not is_due or self._saved_step == progress.step:
            return
        if self._beside:
            logger.warning("Waiting for the checkpoint of the save before: it takes longer than the time between two.")
            self._finish_beside()
        self._retry_at = _NEVER  # this is the next attempt
        try:
            started = self._start(progress)
            if self._config.asynchronous:
                self._beside = _SaveBeside(started, BackgroundWriter(started.write, dist.get_rank()))
            else:
                self._done(started, finish_save(started, started.write()))
        except CheckpointError as error:
            self._alarm(error)

    def save_last(self, progress: Progress) -> None:
        """Have this step's checkpoint on disk when this returns.

        Raises:
            CheckpointError: on every rank, after a few attempts.
        """
        self._finish_beside()
        self._try_last(progress)
        self._committer.shutdown()  # what is to be deleted is

    def _try_last(self, progress: Progress) -> None:
        for pause in (*LAST_PAUSES_SECONDS, None):
            if self._saved_step == progress.step:
                return
            try:
                started = self._start(progress)
                self._done(started, finish_save(started, started.write()))
            except CheckpointError as error:
                if pause is None:
                    raise
                logger.error("%s Trying again in %g s.", error, pause)
                time.sleep(pause)

    def _start(self, progress: Progress) -> StartedSave:
        def check_folder() -> None:
            # A run folder that vanished may be a mount that did: nothing must be written to what lies beneath.
            if not self._checkpoints.parent.is_dir():
                raise CheckpointError(f"{self._checkpoints.parent} is gone.")

        from_rank_zero(check_folder)
        blend, tokens = self._blend, progress.consumed_tokens
        started = start_save(self._run, progress, blend.past_hash(tokens), blend.past(tokens), self._agreed)
        self._agreed = started.agreed
        return started

    def _next_stage(self, save: _SaveBeside) -> None:
        """From written to being committed, or from committed to done; waits for this rank's part if it must."""
        if save.writer is not None:
            reports = gather_reports(save.writer.report(self._run.plan.config.parallel.timeout_seconds / 2))
            save.writer = None
            if dist.get_rank() == 0:
                save.commit = self._committer.submit(partial(commit_save, save.started, reports))
            return
        self._beside = None
        try:
            folder = from_rank_zero(lambda: save.commit.result() if save.commit else Path())
            self._done(save.started, folder)
        except CheckpointError as error:
            self._alarm(error)

    def _finish_beside(self) -> None:
        while self._beside:
            self._next_stage(self._beside)

    def _done(self, started: StartedSave, folder: Path) -> None:
        self._saved_step = started.step
        self._pause, self._retry_at = FIRST_PAUSE_SECONDS, _NEVER
        self._event(f"Saved {folder}")
        if dist.get_rank() == 0:  # thousands of files on a file system of a cluster: training does not wait for that
            keep = self._config.keep_last, self._config.keep_every_tokens
            self._committer.submit(drop_old_checkpoints, self._checkpoints, *keep)

    def _alarm(self, error: CheckpointError) -> None:
        self._retry_at = time.monotonic() + self._pause
        if dist.get_rank() == 0:
            logger.error("%s Training goes on; the next attempt is in %g s or at the next save.", error, self._pause)
            self._event(f"CHECKPOINT NOT SAVED: {error}")
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
