"""One run at a time in a run folder, and no lock that outlives its holder."""

import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from nemotron_train.checkpoint.lock import LOCK_FILE, lock_run_folder
from nemotron_train.errors import ConfigError

_SPAWN = multiprocessing.get_context("spawn")


def hold(run_dir: Path, ready: Connection) -> None:
    lock = lock_run_folder(run_dir)
    ready.send(lock.name)
    signal.pause()


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """Fails if two runs share a folder, the message does not say who is there, or a killed run keeps its folder."""
    receiver, sender = _SPAWN.Pipe(duplex=False)
    first = _SPAWN.Process(target=hold, args=(tmp_path, sender))
    first.start()
    receiver.recv()
    with pytest.raises(ConfigError, match=f"in use by process {first.pid} on {socket.gethostname()}"):
        lock_run_folder(tmp_path)
    first.kill()
    first.join()
    with lock_run_folder(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK_FILE).read_text()


def test_a_lock_file_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    """Fails if what the file says counts, and not whether somebody holds it."""
    (tmp_path / LOCK_FILE).write_text("process 1 on this host, started long ago\n")
    with lock_run_folder(tmp_path):
        assert "long ago" not in (tmp_path / LOCK_FILE).read_text()
