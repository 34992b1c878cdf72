"""Which folders under `RUN_DIR/checkpoints` are complete checkpoints, and how a folder becomes one.

A checkpoint is written to `step_000000100.tmp-…`, gets its `COMMIT.json` last and is then renamed. Nothing is ever
overwritten, and "latest" is derived from the commits that are there, so a kill at any moment leaves the older
checkpoints as they were.
"""

import errno
import json
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemotron_train.checkpoint.hashes import StoredFile, hash_file, hash_text, write_file
from nemotron_train.errors import CheckpointError

COMMIT_FILE = "COMMIT.json"
REASON_FILE = "DAMAGE.txt"
_STEP_FOLDER = re.compile(r"step_(\d{9,})")
_NO_HASH = "0" * 32  # stands where the commit's own hash goes, while that is computed


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written: files are missing, cut or altered. An older one may be whole."""


@dataclass(frozen=True)
class Commit:
    """What a checkpoint says about itself."""

    step: int
    consumed_tokens: int
    skipped_steps: int
    origin: str | None  # the other run's checkpoint that this run started from
    model: dict[str, object]  # the keys its weights depend on (resume_gate.model_facts)
    config_fingerprint: str
    data_hash: str  # of everything that decided the samples up to consumed_tokens
    layout: dict[str, int]
    versions: dict[str, str]
    files: dict[str, StoredFile]  # by path relative to the folder
    config: dict[str, Any] = field(default_factory=dict)  # everything that was asked for; empty: not known
    skipped_at: list[int] = field(default_factory=list)  # the last of the skipped steps, by number
    changes: list[dict[str, Any]] = field(default_factory=list)  # what was changed on resume, and when


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:09d}"


def start_folder(checkpoints: Path, step: int) -> Path:
    """Make the empty temporary folder of a new checkpoint.

    Raises:
        CheckpointError: there is a checkpoint of this step already, or the folder cannot be made.
    """
    existing = step_folder(checkpoints, step)
    if existing.exists():
        try:
            read_commit(existing)
        except DamagedCheckpoint as damage:
            quarantine(existing, str(damage))  # it was whole when the run started
        else:
            raise CheckpointError(
                f"{existing} exists already; a checkpoint is never overwritten. Move it away to save this step again."
            )
    # A name of its own: the writer of a run that was killed may still be at work on the same step.
    temporary = existing.with_suffix(f".tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make {temporary}: {error}. Check run.dir and the free space.") from error
    return temporary


def commit_folder(temporary: Path, files: dict[str, StoredFile] | None = None, **facts: Any) -> Path:
    """Turn a fully written temporary folder into a checkpoint.

    Args:
        files: what its writers wrote, each already forced to disk; without it the folder's files are hashed here.
        facts: the other fields of `Commit`.
    """
    if files is None:
        files = {str(path.relative_to(temporary)): hash_file(path) for path in temporary.rglob("*") if path.is_file()}
        for name in files:
            _sync(temporary / name)
    commit = Commit(files=dict(sorted(files.items())), **facts)
    for folder in {(temporary / name).parent for name in files}:
        _sync(folder)
    partial = temporary / f"{COMMIT_FILE}.partial"
    write_file(partial, [_commit_text(commit).encode()])
    partial.rename(temporary / COMMIT_FILE)
    _sync(temporary)
    final = step_folder(temporary.parent, commit.step)
    if final.exists():  # a rename would replace an empty folder
        raise CheckpointError(f"{final} has appeared while it was being written; a checkpoint is never overwritten.")
    temporary.rename(final)
    _sync(final.parent)
    return final


def read_commit(folder: Path) -> Commit:
    """Read a checkpoint's commit and compare the sizes of its files with it. Who reads a file compares its hash.

    Raises:
        DamagedCheckpoint: the folder is no complete checkpoint; says which file is missing or has another size.
    """
    commit = parse_commit(folder)
    if (match := _STEP_FOLDER.fullmatch(folder.name)) and int(match[1]) != commit.step:
        raise DamagedCheckpoint(f"{folder} has the {COMMIT_FILE} of step {commit.step}.")
    for name, expected in commit.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != expected.size:
            raise DamagedCheckpoint(
                f"{path} should have {expected.size} bytes and has {'none' if found is None else found}."
            )
    return commit


def parse_commit(folder: Path) -> Commit:
    """Read a checkpoint's commit alone; every bit of the file counts."""
    path = folder / COMMIT_FILE
    try:
        text = path.read_bytes().decode()  # as it is: read_text would make one of three kinds of line ends
        facts = json.loads(text)
        stated = facts.pop("hash")
        files = {name: StoredFile(**facts_of_file) for name, facts_of_file in facts.pop("files").items()}
        commit = Commit(files=files, **facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder} is not a complete checkpoint: {COMMIT_FILE}: {error!r}") from error
    if not isinstance(stated, str) or hash_text(text.replace(stated, _NO_HASH, 1)) != stated:
        raise DamagedCheckpoint(f"{folder} is not a complete checkpoint: {COMMIT_FILE} was altered (its hash differs).")
    return commit


def _commit_text(commit: Commit) -> str:
    text = json.dumps({"hash": _NO_HASH, **asdict(commit)}, indent=1)
    return text.replace(_NO_HASH, hash_text(text), 1)


def check_file(folder: Path, name: str, commit: Commit) -> None:
    """Compare one file's bytes with the commit.

    Raises:
        DamagedCheckpoint: they differ, or the commit does not know the file.
        OSError: the file cannot be read for a reason that says nothing about its bytes.
    """
    expected = commit.files.get(name)
    if expected is None:
        raise DamagedCheckpoint(f"{folder / name} is not listed in {COMMIT_FILE}.")
    try:
        found = hash_file(folder / name)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{folder / name} is missing.") from error
    except OSError as error:
        if error.errno != errno.EIO:  # EIO: the medium has lost it
            raise
        raise DamagedCheckpoint(f"{folder / name} cannot be read: {error}") from error
    if found != expected:
        raise DamagedCheckpoint(
            f"{folder / name} was altered: {expected.size} bytes with hash {expected.hash} were written, "
            f"{found.size} bytes with hash {found.hash} are there."
        )


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """List the folders that have a checkpoint's name, newest first, complete or not."""
    folders = [
        (int(match[1]), path) for path in checkpoints.glob("step_*") if (match := _STEP_FOLDER.fullmatch(path.name))
    ]
    return [path for _, path in sorted(folders, reverse=True)]


def newest_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint.

    Returns:
        its folder, or None; and why newer folders were passed over.
    """
    passed_over = []
    for folder in list_checkpoints(checkpoints):
        try:
            read_commit(folder)
        except DamagedCheckpoint as damage:
            passed_over.append(str(damage))
        else:
            return folder, passed_over
    return None, passed_over


def quarantine(folder: Path, reason: str) -> Path:
    """Move a damaged checkpoint aside, with the reason in it; nothing of it is deleted."""
    aside = folder.with_suffix(f".damaged-{time.time_ns()}")
    folder.rename(aside)
    with suppress(OSError):  # a full disk, or a file where the folder should be: the log has the reason too
        (aside / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
    return aside


def quarantined(checkpoints: Path) -> list[str]:
    """List what was moved aside, each with its reason."""
    found = []
    for aside in sorted(checkpoints.glob("step_*.damaged-*")):
        reason = aside / REASON_FILE
        found.append(reason.read_text(encoding="utf-8").strip() if reason.is_file() else f"{aside} was moved aside.")
    return found


def _sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
