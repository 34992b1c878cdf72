"""`nemotron_train.train` with a fault planted as the environment variable FAULT says; started by test_failures.py."""

import os
import re
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

import nemotron_train.train as front_door
from nemotron_train.checkpoint import saver
from nemotron_train.config.load import read_resolved
from nemotron_train.config.schema import RunConfig
from nemotron_train.trainer import Trainer

FAULT = os.environ["FAULT"]
FAULT_STEP = int(match[1]) if (match := re.search(r"step (\d+)", FAULT)) else -1
FAULT_RANK = match[1] if (match := re.search(r"rank (\d+)", FAULT)) else None


class FaultyTrainer(Trainer):
    def check_skips(self, result: Any, progress: Any) -> None:
        super().check_skips(result, progress)
        if progress.step != FAULT_STEP or FAULT_RANK not in (None, os.environ.get("RANK")):
            return
        if FAULT.startswith("raise"):
            raise ValueError(f"planted fault at step {progress.step}")
        if FAULT.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT.startswith("full disk"):
            # A write beyond the limit fails with an OSError, as on a full disk: to a checkpoint, and to every log.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


def load_config(arguments: Sequence[str]) -> RunConfig:
    return read_resolved(arguments[0])


if __name__ == "__main__":
    front_door.Trainer = FaultyTrainer
    saver.LAST_PAUSES_SECONDS = (0.1, 0.1)
    front_door.load_config = load_config
    sys.exit(front_door.main(sys.argv[1:]))
