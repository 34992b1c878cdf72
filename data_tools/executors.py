"""Where does the work of a job run: in this process, in several on this machine, or on a Ray cluster?"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from nemotron_train.errors import ConfigError, DataError

EXECUTORS = ("local", "ray")
MOST_WAITING = 10_000  # tasks handed to Ray and not done
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_all(
    work: Callable[[_Item], _Result], items: Sequence[_Item], executor: str, num_workers: int
) -> Iterator[_Result]:
    """Do the work on every item and yield the results as they come.

    Args:
        num_workers: local processes; Ray has as many as its cluster's CPUs.

    Raises:
        what `work` raises; DataError: a process was killed; ConfigError: Ray is asked for and not installed.
    """
    if executor == "ray":
        yield from _on_ray(work, items)
    elif num_workers == 1 or len(items) <= 1:
        yield from map(work, items)
    else:
        yield from _in_processes(work, items, num_workers)


def _in_processes(work: Callable[[_Item], _Result], items: Sequence[_Item], num_workers: int) -> Iterator[_Result]:
    # Spawned, because forking a process whose tokenizer library has started threads can hang.
    pool = ProcessPoolExecutor(
        min(num_workers, len(items)), mp_context=get_context("spawn"), initializer=use_one_thread
    )
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError("A working process was killed, perhaps for lack of memory. Lower --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _on_ray(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('--executor ray: Ray is not installed (pip install "nemotron-train[ray]").')
    import ray

    if not ray.is_initialized():
        # A cluster where there is one (RAY_ADDRESS, or on a node of it), else one on this machine.
        ray.init(logging_level="ERROR", log_to_driver=False)
    remote = ray.remote(num_cpus=1)(_alone)
    # Not all at once: Ray looks through what waits each time.
    left = iter(items)
    waiting: list[Any] = []
    try:
        while True:
            waiting += [remote.remote(work, item) for item in islice(left, MOST_WAITING - len(waiting))]
            if not waiting:
                return
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else DataError(str(error)) from error


def _alone(work: Callable[[_Item], _Result], item: _Item) -> _Result:
    use_one_thread()
    return work(item)


def use_one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
