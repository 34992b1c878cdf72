"""What a user sees when a rank fails: the first cause once, and from the other ranks one line each.

When one rank dies, the others fail a moment later with lost connections. Failing ranks therefore ask the launcher's
store who was first.
"""

import logging
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from nemotron_train.errors import NemotronTrainError
from nemotron_train.platform.ranks import LaunchedRank

logger = logging.getLogger(__name__)

_COUNT, _CAUSE = "nemotron_train/failed_ranks", "nemotron_train/first_cause"
_STORE_TIMEOUT = timedelta(seconds=5)
_LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "NCCL communicator was aborted",
)


def report_failure(error: BaseException, me: LaunchedRank) -> None:
    """Say why this rank fails: in full if it is the first to, else in one line that names the first cause."""
    lost = _lost_connection(error)
    first_line = (str(error).splitlines() or [""])[0]
    summary = f"{type(error).__name__}: {first_line}"
    if lost:
        summary = "lost its connection to another rank, which died or was killed"
    first = _first_cause(f"rank {me.rank}: {summary}", me) if me.world_size > 1 else None
    if first is not None:
        logger.error("Stopping, because another rank failed first (%s).", first)
        return
    if isinstance(error, NemotronTrainError):
        logger.error("%s: %s", type(error).__name__, error)
    elif lost:
        logger.error("This rank %s: %s", summary, first_line)
    else:
        logger.error("Unexpected %s", type(error).__name__, exc_info=error)
    if me.is_launched:
        get_error_handler().record_exception(error)  # torchrun repeats it in its own summary


def _lost_connection(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_CONNECTION)


def _first_cause(summary: str, me: LaunchedRank) -> str | None:
    """Enter this failure into the launcher's store.

    Returns:
        None if it is the first (or the store cannot be reached), else the summary of the first.
    """
    if not me.is_launched:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.PrefixStore(
            f"attempt_{attempt}",
            dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_STORE_TIMEOUT
            ),
        )
        if store.add(_COUNT, 1) == 1:
            store.set(_CAUSE, summary)
            return None
        return store.get(_CAUSE).decode()
    except (
        RuntimeError,
        ValueError,
        KeyError,
    ):  # torch's store errors are RuntimeErrors: the host of the store is gone
        return None
