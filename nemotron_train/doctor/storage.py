"""Does a folder take and give back what a run writes, whole and fast enough?"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nemotron_train.doctor.findings import Finding, Status

MIN_MBS = 100  # a checkpoint of 12B parameters, about 170 GB, takes half an hour at this speed (our choice)
MIN_FREE_GB = 10
BLOCK = 1 << 20


def check_storage(folder: Path, megabytes: int, read: Callable[[Path], bytes] = Path.read_bytes) -> list[Finding]:
    """Write, fsync and read back a file of so many MiB, rename it, and lock one.

    Args:
        read: how the file is read back.
    """
    check = f"storage of {folder}"
    other = "Choose another folder (run.dir)."
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor_") as scratch:
            data = os.urandom(BLOCK) * megabytes
            path = Path(scratch) / "written"
            write_seconds = _write(path, data)
            path = path.rename(path.with_name("renamed"))  # what makes a checkpoint complete
            began = time.perf_counter()
            same = read(path) == data
            read_seconds = time.perf_counter() - began
            findings = [_lock_finding(Path(scratch), folder)]
    except OSError as error:
        return [Finding(check, Status.missing, f"cannot be written: {error}", other)]
    speeds = [megabytes * BLOCK / 1e6 / seconds for seconds in (write_seconds, read_seconds)]
    free = shutil.disk_usage(folder).free / 1e9
    found = f"writes {speeds[0]:.0f} MB/s, reads {speeds[1]:.0f} MB/s, {free:.0f} GB free"
    if not same:
        findings.append(Finding(check, Status.wrong, "what was read is not what was written", other))
    elif min(speeds) < MIN_MBS or free < MIN_FREE_GB:
        fix = f"Checkpoints want at least {MIN_MBS} MB/s and {MIN_FREE_GB} GB. {other}"
        findings.append(Finding(check, Status.slow, found, fix, required=False))
    else:
        findings.append(Finding(check, Status.ok, found))
    return findings


def _write(path: Path, data: bytes) -> float:
    """Return the seconds until the data is on the disk; the system's copy of it in memory is dropped."""
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return seconds


def _lock_finding(scratch: Path, folder: Path) -> Finding:
    """File locks keep two tokenizing jobs apart; some network file systems lack them."""
    check = f"file locks in {folder}"
    try:
        with (scratch / "lock").open("w") as first, (scratch / "lock").open("w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Finding(check, Status.ok, "hold")
    except OSError as error:
        fix = "Mount the file system with locks (Lustre: -o flock) before tokenizing into this folder."
        return Finding(check, Status.missing, str(error), fix, required=False)
    fix = "Two jobs that tokenize into this folder would not see each other; use another folder for that."
    return Finding(check, Status.wrong, "two holders of one lock", fix, required=False)
