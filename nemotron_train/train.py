"""Front door: `python -m nemotron_train.train experiment=NAME key=value ...`, alone or under torchrun."""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

from nemotron_train.checkpoint.lock import lock_run_folder
from nemotron_train.checkpoint.resume import check_named_folder
from nemotron_train.config.load import fingerprint, load_config
from nemotron_train.data.run_data import open_run_data
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.user_buffers import user_buffers
from nemotron_train.errors import EXIT_FAILED, EXIT_REQUEUE, ConfigError
from nemotron_train.plan.describe import describe
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.determinism import set_determinism
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.failure import report_failure
from nemotron_train.platform.ranks import LaunchedRank, launched_rank
from nemotron_train.platform.signals import StopRequest
from nemotron_train.platform.support import check_support
from nemotron_train.trainer import Trainer, build_runtime

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the overrides say.

    Returns:
        the exit code: 0 when all tokens are trained on, EXIT_REQUEUE after a stop signal, EXIT_FAILED after an error.
    """
    me = LaunchedRank(rank=0, world_size=1, local_rank=0)
    try:
        me = launched_rank()
        log_to_stderr(me)
        return run(sys.argv[1:] if arguments is None else list(arguments), me)
    except (Exception, KeyboardInterrupt) as error:
        report_failure(error, me)
        if me.world_size > 1:
            # Leave at once: tearing down process groups would wait for collectives that other ranks will never join.
            # They see this rank's connections close and stop too.
            logging.shutdown()
            os._exit(EXIT_FAILED)
        return EXIT_FAILED


def run(arguments: Sequence[str], me: LaunchedRank) -> int:
    """Configuration, plan, data and the checkpoint's folder are checked before any process group starts."""
    config = load_config(arguments)
    plan = plan_run(config, me.world_size)
    logger.info("%s", describe(plan))
    check_named_folder(config)
    data = open_run_data(config)
    lock = lock_writable(Path(config.run.dir)) if me.rank == 0 else nullcontext()
    platform = choose_platform(me)
    check_support(config, platform)
    set_determinism(config.train.deterministic)
    stop = StopRequest()
    with (
        lock,
        process_groups(
            plan.layout,
            platform,
            me,
            timeout_seconds=config.parallel.timeout_seconds,
            seed=config.run.seed,
            fingerprint=fingerprint(config) + data.blend.past_hash(plan.batches.consumed_at_end),
        ) as groups,
        user_buffers(plan),
    ):
        stop.listen()  # not before all ranks have met: until then a signal ends a rank, instead of leaving it to wait
        runtime = build_runtime(plan, platform, groups)
        finished = Trainer(runtime, data, stop, is_reporter=me.rank == 0).train()
    return 0 if finished else EXIT_REQUEUE


def lock_writable(run_dir: Path) -> TextIO:
    """Make the run folder, and take it for this run while the returned file is open.

    Raises:
        ConfigError: it cannot be made, nothing can be written into it, or another run is using it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
        return lock_run_folder(run_dir)
    except OSError as error:
        raise ConfigError(f"run.dir={run_dir} cannot be written: {error}. Choose another run.dir.") from error


def log_to_stderr(me: LaunchedRank) -> None:
    """Rank 0 tells what it does; the others only what goes wrong. Megatron-Core's own notes are left out."""
    form = "%(message)s" if me.world_size == 1 else f"[rank {me.rank}] %(message)s"
    logging.basicConfig(
        level=logging.INFO if me.rank == 0 else logging.WARNING,
        format=form,
        handlers=[_StderrOfTheMoment()],
        force=True,
    )
    logging.getLogger("megatron").setLevel(logging.ERROR)


class _StderrOfTheMoment(logging.StreamHandler):
    """Writes to what `sys.stderr` is when a message comes: while a progress bar is on the terminal, that scrolls
    messages by above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


if __name__ == "__main__":  # the checkpoint writer starts processes that import this module again
    sys.exit(main())
