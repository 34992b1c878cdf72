"""What a user sees when something goes wrong in a real torchrun launch: one clear cause, a non-zero exit within
seconds, and older checkpoints intact."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_train.checkpoint.commit import newest_checkpoint, read_commit
from nemotron_train.config.load import write_resolved
from nemotron_train.errors import EXIT_FAILED, EXIT_REQUEUE
from tests.small_runs import read_metrics, small_config

REPOSITORY = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("faulty_train.py")


def start(config_path: Path, ranks: int, fault: str = "") -> subprocess.Popen:
    """Start `faulty_train.py` under torchrun (or alone), with its output in one pipe."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "FAULT": fault}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(FAULTS), str(config_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float = 120) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"did not end within {seconds} s:\n{process.communicate()[0]}")
    return output


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and any(record["step"] >= step for record in read_metrics(run_dir)):
            return
        time.sleep(0.1)
    pytest.fail(f"no step {step}:\n{finish(process)}")


@pytest.fixture
def config_path(corpus: Path, tmp_path: Path) -> Path:
    """A run of many steps that saves at steps 4 and 8, …"""
    config = small_config(
        corpus, tmp_path / "run", steps=2_000, checkpoint={"every_steps": 4}, data={"max_epochs": 1e3}
    )
    write_resolved(config, tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(read_commit(path.parent).step for path in run_dir.glob("checkpoints/step_*/COMMIT.json"))


def test_an_exception_on_one_rank_stops_all_and_is_what_the_user_sees(config_path: Path, tmp_path: Path) -> None:
    """Fails if the other rank hangs, or its lost connection hides the cause."""
    began = time.monotonic()
    output = finish(start(config_path, 2, "raise on rank 1 at step 6"))
    assert "planted fault at step 6" in output
    assert "Stopping, because another rank failed first (rank 1: ValueError: planted fault" in output
    assert "[rank 0] Unexpected" not in output
    assert saved_steps(tmp_path / "run") == [4]
    assert time.monotonic() - began < 100


def test_a_killed_rank_stops_the_others(config_path: Path, tmp_path: Path) -> None:
    """Fails if kill -9 of one rank leaves the other waiting, or the launcher's exit code says success."""
    process = start(config_path, 2, "kill rank 1 at step 6")
    output = finish(process)
    assert process.returncode != 0
    assert "lost its connection to another rank" in output or "SIGKILL" in output
    folder, passed_over = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert folder is not None
    assert (folder.name, passed_over) == ("step_000000004", [])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_signal_saves_and_the_same_command_goes_on(config_path: Path, tmp_path: Path, ranks: int) -> None:
    """Fails if SIGTERM loses steps, the exit code does not ask for a requeue, or the next start begins anew."""
    process = start(config_path, ranks)
    wait_for_step(process, tmp_path / "run", 5)
    process.send_signal(signal.SIGTERM)  # to torchrun where there is one, which passes it on
    output = finish(process)
    assert process.returncode == (EXIT_REQUEUE if ranks == 1 else 1), output
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert saved_steps(tmp_path / "run")[-1] == last
    assert f"goes on from step {last}" in output
    if ranks > 1:
        return
    again = start(config_path, 1)
    wait_for_step(again, tmp_path / "run", last + 1)
    again.send_signal(signal.SIGINT)
    assert f"step_{last:09d}: step {last}," in finish(again)


def test_a_full_disk_costs_a_periodic_save_but_not_the_last_one(corpus: Path, tmp_path: Path) -> None:
    """Fails if training stops at the first save, line of a log or picture that cannot be written, ends as if it had
    saved its last state, leaves temporary folders, or harms an older checkpoint."""
    config = small_config(
        corpus, tmp_path / "run", steps=12, checkpoint={"every_steps": 4}, train={"eval_every_steps": 10}
    )
    write_resolved(config, tmp_path / "config.yaml")
    process = start(tmp_path / "config.yaml", 2, "full disk after step 6")
    output = finish(process)
    assert process.returncode != 0
    assert "Cannot write the checkpoint of step 8" in output
    assert "Training goes on" in output
    assert output.count("Cannot write the checkpoint of step 12") >= 3  # two attempts more, and then the end
    for what in ("account for step 7", "log step 7", "log the held-out loss of step 10", "draw "):
        assert f"Cannot {what}" in output
    assert read_metrics(tmp_path / "run")[-1]["step"] == 5
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000000004"]
    assert saved_steps(tmp_path / "run") == [4]


def test_a_second_run_in_the_same_folder_is_refused(config_path: Path, tmp_path: Path) -> None:
    """Fails if two launches write the same steps, or the refusal does not say who is there."""
    first = start(config_path, 1)
    wait_for_step(first, tmp_path / "run", 1)
    second = start(config_path, 1)
    output = finish(second)
    first.send_signal(signal.SIGTERM)
    finish(first)
    assert second.returncode == EXIT_FAILED
    assert f"is in use by process {first.pid} on " in output
