"""Does launch/torchrun.sh start ranks, pass a signal on, and tell a stop from a failure? Real ranks under torchrun."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_train.checkpoint.commit import newest_checkpoint, read_commit
from nemotron_train.errors import EXIT_FAILED, EXIT_REQUEUE
from tests.small_runs import read_metrics
from tests.small_runs_by_command import small_overrides

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The scripts in a folder where setting up means to take the Python of the tests."""
    folder = tmp_path / "repository" / "launch"
    folder.mkdir(parents=True)
    for name in ("torchrun.sh", "ranks.sh", "env.sh"):
        shutil.copy(REPOSITORY / "launch" / name, folder / name)
    (folder / "setup.sh").write_text(f'python={sys.executable}\nsay() {{ echo "== $*" >&2; }}\n')
    return folder / "torchrun.sh"


def start(script: Path, *overrides: str, ranks: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NPROC": str(ranks)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.Popen(
        ["bash", str(script), *overrides], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_signal_saves_and_ends_with_the_code_that_asks_to_go_on(script: Path, corpus: Path, tmp_path: Path) -> None:
    """Fails if USR1 kills torchrun or does not reach its ranks, or the script ends with torchrun's 1."""
    run_dir = tmp_path / "run"
    process = start(script, *small_overrides(corpus, run_dir, steps=100_000), ranks=2)
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_REQUEUE, output
    folder, _ = newest_checkpoint(run_dir / "checkpoints")
    assert folder is not None
    assert read_commit(folder).step == read_metrics(run_dir)[-1]["step"]


def test_a_failure_is_no_stop(script: Path, corpus: Path, tmp_path: Path) -> None:
    """Fails if an error of the user ends with the code that asks to go on."""
    process = start(script, *small_overrides(corpus, tmp_path / "run", steps=10), "lr.peak=-1", ranks=1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_FAILED, output
    assert "lr.peak" in output
