"""Which checkpoints stay? The last few, one every so many tokens, and always a good one.

Deleting begins with a rename, so that a kill in the middle leaves no folder that looks like a checkpoint.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from nemotron_train.checkpoint.commit import DamagedCheckpoint, list_checkpoints, read_commit

logger = logging.getLogger(__name__)


def drop_old_checkpoints(checkpoints: Path, keep_last: int, keep_every_tokens: int) -> list[Path]:
    """Delete what need not stay. Folders that are no complete checkpoints are neither counted nor touched.

    Args:
        keep_last: the newest so many stay; 0: all.
        keep_every_tokens: of each stretch of so many tokens the first stays too; 0: none.

    Returns:
        what was deleted. What cannot be deleted is logged and left for the next time.
    """
    if keep_last == 0:
        return []
    complete = []
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            complete.append((folder, read_commit(folder).consumed_tokens))
        except DamagedCheckpoint:
            continue
    deleted = [folder for folder in to_delete(complete, keep_last, keep_every_tokens) if _delete(folder)]
    if deleted:
        logger.info("Deleted %s: older than the last %d.", ", ".join(f.name for f in deleted), keep_last)
    return deleted


def to_delete(checkpoints: Sequence[tuple[Path, int]], keep_last: int, keep_every_tokens: int) -> list[Path]:
    """Choose what to delete.

    Args:
        checkpoints: folder and consumed tokens of each complete checkpoint, oldest first.
    """
    chosen, stretch_before = [], 0
    for folder, tokens in checkpoints[:-keep_last]:
        stretch = tokens // keep_every_tokens if keep_every_tokens else 0
        if stretch <= stretch_before:  # not the first of its stretch
            chosen.append(folder)
        stretch_before = stretch
    return chosen


def sweep(checkpoints: Path) -> None:
    """Remove what runs that were killed left behind: saves that were never finished, and deletions."""
    for pattern in ("step_*.tmp*", "step_*.deleting-*"):
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _delete(folder: Path) -> bool:
    doomed = folder.with_suffix(f".deleting-{time.time_ns()}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("Cannot delete the old checkpoint %s: %s", folder, error)
        return False
    return True
