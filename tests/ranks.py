"""Real multi-rank runs inside pytest: a pool of processes that are started once and take one job after another.

A job is a module-level function; it runs on `world_size` processes at once, each as one rank with a gloo process
group's environment, and returns something picklable. A job that fails on any rank fails the test with that rank's
traceback, and the pool is started anew.
"""

import gc
import multiprocessing
import os
import queue
import secrets
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOB_SECONDS = 240
FIXED_PORTS = range(20_000, 32_768)  # Linux gives connections and servers without a wish those above
# Forks of a process that has imported torch and Megatron-Core once, which takes seconds; fresh processes where imports
# may have touched a GPU, because CUDA does not survive a fork.
CAN_FORK = sys.platform == "linux" and not Path("/dev/nvidiactl").exists()


def _serve(jobs: multiprocessing.Queue, results: multiprocessing.Queue) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    pytest_process = multiprocessing.parent_process()
    while pytest_process is not None and pytest_process.is_alive():  # one that was killed leaves no workers behind
        try:
            job = jobs.get(timeout=5)
        except queue.Empty:
            continue
        function, rank, world_size, port, args = job
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        try:
            results.put((rank, True, function(*args)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        # Runs refer to themselves in circles, and each keeps some fifty threads of its process groups alive.
        del function, args, job
        gc.collect()


class RankPool:
    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
        if CAN_FORK:
            self._context.set_forkserver_preload(["tests.small_runs", "tests.engine.live"])
        self._workers: list[tuple[Any, Any]] = []
        self._results: Any = None

    def _grow(self, world_size: int) -> None:
        if self._results is None:
            self._results = self._context.Queue()
        while len(self._workers) < world_size:
            jobs = self._context.Queue()
            worker = self._context.Process(
                target=_serve, args=(jobs, self._results)
            )  # not daemonic: saving starts processes
            worker.start()
            self._workers.append((worker, jobs))

    def run(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """Run `function(*args)` as ranks 0 … world_size - 1; returns what each rank returned."""
        self._grow(world_size)
        port = free_port()
        for rank in range(world_size):
            self._workers[rank][1].put((function, rank, world_size, port, args))
        returned: dict[int, Any] = {}
        while len(returned) < world_size:
            try:
                rank, succeeded, value = self._results.get(timeout=JOB_SECONDS)
            except queue.Empty:
                self.close()
                raise AssertionError(
                    f"{function.__name__}: ranks {sorted(set(range(world_size)) - set(returned))} did not return"
                ) from None
            if not succeeded:
                self.close()  # the other ranks may wait for this one for ever
                raise AssertionError(f"{function.__name__} failed on rank {rank} of {world_size}:\n{value}")
            returned[rank] = value
        return [returned[rank] for rank in range(world_size)]

    def close(self) -> None:
        for worker, _ in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._results = [], None


def free_port() -> int:
    """Find a port that nobody listens on: below those that the kernel hands out, of which another rank's connection may
    be given the same before this one is used."""
    while True:
        port = secrets.choice(FIXED_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
