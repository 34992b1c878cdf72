"""May this run use its folder? One run at a time: two would write the same steps.

The lock is one of the operating system's on an open file, so it ends with the process that holds it, however that
ends; what the file says is only for people. A forked checkpoint writer does not inherit it.
"""

import fcntl
import logging
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from nemotron_train.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


def lock_run_folder(run_dir: Path) -> TextIO:
    """Take the folder for this process; the lock is held while the returned file is open.

    Raises:
        ConfigError: another process holds it; says which, on what host.
    """
    file = open(run_dir / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 (held open on purpose)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "a process that has not said who it is"
        file.close()
        raise ConfigError(
            f"run.dir={run_dir} is in use by {holder}. Wait for that run to end, stop it, or choose another run.dir."
        ) from error
    except OSError as error:
        logger.warning("run.dir=%s cannot be locked (%s): make sure that no other run uses it.", run_dir, error)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
    file.flush()
    return file
