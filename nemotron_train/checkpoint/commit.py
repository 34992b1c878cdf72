"""Which folders under `RUN_DIR/checkpoints` are complete checkpoints, and how a folder becomes one.

A checkpoint is written to `step_000000100.tmp`, gets its `COMMIT.json` last and is then renamed. Nothing is ever
overwritten in place, and "latest" is derived from the commits that are there, so a kill at any moment leaves the older
checkpoints as they were.
"""

import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemotron_train.errors import CheckpointError

COMMIT_FILE = "COMMIT.json"
_STEP_FOLDER = re.compile(r"step_(\d{9,})")


@dataclass(frozen=True)
class Commit:
    """What a checkpoint says about itself."""

    step: int
    consumed_tokens: int
    skipped_steps: int
    origin: str | None  # the other run's checkpoint that this run started from
    model: dict[str, object]  # the keys its weights depend on (resume.model_facts)
    config_fingerprint: str
    data_hash: str  # of everything that decided the samples up to consumed_tokens
    layout: dict[str, int]
    versions: dict[str, str]
    files: dict[str, int]  # bytes by path relative to the folder
    data_past: dict[str, Any] = field(default_factory=dict)  # what data_hash is of, to show what differs; may be absent


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:09d}"


def start_folder(checkpoints: Path, step: int) -> Path:
    """Make the empty temporary folder of a new checkpoint; drops what an interrupted save left in it.

    Raises:
        CheckpointError: there is a checkpoint of this step already, or the folder cannot be made.
    """
    existing = step_folder(checkpoints, step)
    if existing.exists() and not _is_complete(existing):
        existing.rename(
            existing.with_suffix(f".damaged-{time.time_ns()}")
        )  # the run went back to an older one and is here again
    if existing.exists():
        raise CheckpointError(
            f"{step_folder(checkpoints, step)} exists already; a checkpoint is never overwritten. Move it away to save "
            "this step again."
        )
    temporary = step_folder(checkpoints, step).with_suffix(".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make {temporary}: {error}. Check run.dir and the free space.") from error
    return temporary


def _is_complete(folder: Path) -> bool:
    try:
        read_commit(folder)
    except CheckpointError:
        return False
    return True


def commit_folder(temporary: Path, **facts: object) -> Path:
    """Turn a fully written temporary folder into a checkpoint; `facts` are the fields of `Commit` except `files`."""
    files = {
        str(path.relative_to(temporary)): path.stat().st_size for path in sorted(temporary.rglob("*")) if path.is_file()
    }
    commit = Commit(files=files, **facts)  # type: ignore[arg-type]
    for name in files:
        _sync(temporary / name)
    with open(temporary / COMMIT_FILE, "w") as file:
        json.dump(asdict(commit), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(temporary)
    final = step_folder(temporary.parent, commit.step)
    temporary.rename(final)
    _sync(final.parent)
    return final


def read_commit(folder: Path) -> Commit:
    """Read a checkpoint's commit and compare its files with it.

    Raises:
        CheckpointError: the folder is no complete checkpoint; says which file is missing or has another size.
    """
    try:
        commit = Commit(**json.loads((folder / COMMIT_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {COMMIT_FILE}: {error}") from error
    for name, size in commit.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise CheckpointError(f"{path} should have {size} bytes and has {'none' if found is None else found}.")
    return commit


def newest_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint.

    Returns:
        its folder, or None; and why newer folders were passed over.
    """
    folders = [
        (int(match[1]), path) for path in checkpoints.glob("step_*") if (match := _STEP_FOLDER.fullmatch(path.name))
    ]
    passed_over = []
    for _, folder in sorted(folders, reverse=True):
        try:
            read_commit(folder)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return folder, passed_over
    return None, passed_over


def _sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
