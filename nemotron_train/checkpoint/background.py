"""How does a rank write beside training? In a forked process, which sees memory as it was at the fork.

On a GPU run the tensors were copied to the host before; on a CPU run they are the model's own, and the fork is the
copy: pages that the next step changes are copied by the operating system then, and the writer keeps the old ones.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from nemotron_train.checkpoint.torch_dist import WrittenFiles

_FORK = multiprocessing.get_context("fork")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class BackgroundWriter:
    """One rank's writer process, from its start to its result."""

    def __init__(self, write: Callable[[], WrittenFiles], rank: int) -> None:
        """Args:
        write: runs in the process; must not raise.
        """
        self._rank = rank
        self._receiver, sender = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_write_and_leave, args=(write, sender), name="checkpoint-writer")
        self._process.start()
        sender.close()  # the pipe ends when the writer does

    @property
    def is_writing(self) -> bool:
        # Its result is awaited, not its end: a result larger than the pipe keeps the writer alive until it is read.
        return not self._receiver.poll()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def report(self, timeout_seconds: float) -> bytes:
        """Wait for the writer and return its `WrittenFiles.to_report`; a writer that died, or is not done in time, is
        a failed write."""
        if not self._receiver.poll(timeout_seconds):
            self._process.kill()
            self._process.join()
            return self._failed(f"was not done after {timeout_seconds:g} s more")
        try:
            report = self._receiver.recv_bytes()
        except EOFError:
            self._process.join()
            report = self._failed(f"ended with exit code {self._process.exitcode}")
        self._receiver.close()
        return report  # the process is on its way out; the next one's start, or this one's end, takes leave of it

    def _failed(self, how: str) -> bytes:
        return WrittenFiles(self._rank, error=f"the writer process {how}").to_report()


def _write_and_leave(write: Callable[[], WrittenFiles], sender: Connection) -> None:
    """Leaves without the interpreter's clean-up, which could wait for locks that threads of the parent held."""
    torch.set_num_threads(1)  # the threads that compute did not come along
    if _libc is not None:
        _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # nobody would commit what an orphan wrote
    exit_code = 1
    try:
        sender.send_bytes(write().to_report())
        exit_code = 0
    finally:
        os._exit(exit_code)
