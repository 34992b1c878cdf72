"""Does launch/slurm/pretrain.sbatch keep a run going? Asked of the real Slurm, over CPU ranks on two virtual nodes."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools.shard_writer import write_shard
from nemotron_train.checkpoint.commit import newest_checkpoint, read_commit
from tests.slurm.cluster import SYSTEM_PATH, Cluster, read_lines, wait_until
from tests.small_runs import write_corpus
from tests.small_runs_by_command import STEP_TOKENS, small_overrides

pytestmark = pytest.mark.slurm

SCRIPT = "launch/slurm/pretrain.sbatch"
ENDLESS = 1_000_000
MINUTES = 60.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Job:
    """A run submitted to the cluster, and what can be seen of it from outside."""

    def __init__(self, cluster: Cluster, corpus: Path, folder: Path, *, steps: int, options: tuple[str, ...]) -> None:
        self.cluster = cluster
        self.run_dir, self.output, self.logs = folder / "run", folder / "job.out", folder / "logs"
        self.number = cluster.submit(
            "--nodes=2", f"--output={self.output}", *options, SCRIPT,
            *small_overrides(corpus, self.run_dir, steps=steps), PYTHON=sys.executable, LOG_DIR=str(self.logs),
        )  # fmt: skip

    @property
    def metrics(self) -> list[dict]:
        return list(read_lines(self.run_dir / "metrics.jsonl"))

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def wait_until(self, is_true: Callable[[], object], seconds: float) -> None:
        wait_until(is_true, seconds, self.tell)

    def tell(self) -> str:
        """All that a failed test needs."""
        texts = [
            path.read_text()[-3000:] for path in [self.output, *sorted(self.logs.rglob("rank_*.log"))] if path.exists()
        ]
        return "\n".join([json.dumps(self.cluster.job(self.number)), f"step {self.last_step}", *texts])


@pytest.fixture
def submit(cluster: Cluster, corpus: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def submit(name: str, *options: str, steps: int, damaged: Path | None = None) -> Job:
        (tmp_path / name).mkdir()
        jobs.append(Job(cluster, damaged or corpus, tmp_path / name, steps=steps, options=options))
        return jobs[-1]

    yield submit
    cluster.end_jobs()  # a failed test's job would be in the way of the next test's


def write_corpus_with_a_token_outside_the_vocabulary(folder: Path) -> Path:
    folder.mkdir()
    write_corpus(folder)
    documents = [np.arange(90) for _ in range(400)]
    documents[200] = np.full(90, 200)
    for suffix in (".bin", ".idx", ".meta.json"):
        (folder / f"a{suffix}").unlink(missing_ok=True)
    write_shard(folder / "a", documents, np.dtype(np.uint16))
    return folder


def saved_step(job: Job) -> int:
    folder, passed_over = newest_checkpoint(job.run_dir / "checkpoints")
    assert folder is not None, job.tell()
    assert passed_over == []
    return read_commit(folder).step


def test_a_job_asked_to_stop_saves_goes_back_into_the_queue_and_ends_as_one_that_was_not(
    submit: Callable[..., Job],
) -> None:
    """Fails if the signal does not reach the ranks, exit code 85 gets lost on its way, the job is not requeued, or the
    second start begins anew, leaves a gap, or computes anything else than a straight run."""
    steps = 600
    job = submit("interrupted", "--ntasks-per-node=2", "--time=20", steps=steps)
    job.wait_until(lambda: job.last_step >= 50, 5 * MINUTES)
    job.cluster.command("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until(lambda: job.state == "PENDING", 2 * MINUTES)
    first = job.metrics
    assert 50 <= first[-1]["step"] < steps
    assert saved_step(job) == first[-1]["step"]
    job.wait_until(lambda: job.state == "COMPLETED", 6 * MINUTES)
    assert job.restarts == 1
    whole = job.metrics
    assert [record["step"] for record in whole] == list(range(1, steps + 1))
    assert [record["consumed_tokens"] for record in whole] == [step * STEP_TOKENS for step in range(1, steps + 1)]
    assert saved_step(job) == steps
    output = job.output.read_text()
    assert "back into the queue: saved" in output
    assert "finished" in output  # both starts write into one file
    second_log = (job.logs / "start_2" / "rank_0000.log").read_text()
    assert f"step {first[-1]['step']}," in second_log
    assert sorted(path.name for path in (job.logs / "start_2").glob("rank_*")) == [f"rank_000{r}.log" for r in range(4)]

    straight = submit("straight", "--ntasks-per-node=2", "--time=20", steps=steps)
    straight.wait_until(lambda: straight.state == "COMPLETED", 6 * MINUTES)
    assert [r["loss"] for r in straight.metrics] == [r["loss"] for r in whole]
    assert straight.restarts == 0


def test_a_job_that_runs_into_its_time_limit_goes_on_until_it_is_cancelled(submit: Callable[..., Job]) -> None:
    """Fails if Slurm's signal ahead of the limit does not lead to a checkpoint and a requeue, or scancel leads to
    one."""
    job = submit("endless", "--ntasks-per-node=1", "--time=3", "--signal=B:USR1@30", steps=ENDLESS)
    job.wait_until(lambda: job.restarts == 1, 5 * MINUTES)
    first = job.metrics
    assert len(first) == first[-1]["step"] == saved_step(job)
    job.wait_until(lambda: job.last_step > first[-1]["step"], 5 * MINUTES)
    steps = [record["step"] for record in job.metrics]  # read once: the job goes on
    assert steps == list(range(1, len(steps) + 1))
    restarts = job.restarts  # one, unless this machine is so slow that the second start met its limit as well
    job.cluster.command("scancel", job.number)
    job.wait_until(lambda: job.state == "CANCELLED", 2 * MINUTES)
    job.wait_until(lambda: "not put back into the queue" in job.output.read_text(), MINUTES)
    assert (job.state, job.restarts) == ("CANCELLED", restarts)
    assert saved_step(job) == job.last_step > first[-1]["step"]


def test_a_job_that_makes_way_for_another_saves_first_and_goes_on_after_it(submit: Callable[..., Job]) -> None:
    """Fails if preemption loses steps, or the job does not come back."""
    job = submit("preempted", "--ntasks-per-node=1", "--time=20", steps=ENDLESS)
    job.wait_until(lambda: job.last_step >= 20, 5 * MINUTES)
    urgent = job.cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.wait_until(lambda: job.restarts == 1, 3 * MINUTES)
    first = job.metrics
    assert len(first) == first[-1]["step"] == saved_step(job)
    job.wait_until(lambda: job.cluster.job(urgent)["JobState"] == "COMPLETED", 2 * MINUTES)
    job.wait_until(lambda: job.last_step > first[-1]["step"], 5 * MINUTES)
    steps = [record["step"] for record in job.metrics]  # read once: the job goes on
    assert steps == list(range(1, len(steps) + 1))


def test_a_job_that_fails_names_the_cause_and_stays_out_of_the_queue(
    submit: Callable[..., Job], tmp_path: Path
) -> None:
    """Fails if a failure is requeued, its exit code lost, or its cause does not stand where the job is told of."""
    corpus = write_corpus_with_a_token_outside_the_vocabulary(tmp_path / "damaged")
    job = submit("failing", "--ntasks-per-node=1", "--time=20", steps=ENDLESS, damaged=corpus)
    job.wait_until(lambda: job.state in ENDED, 4 * MINUTES)
    assert (job.state, job.restarts, job.cluster.job(job.number)["ExitCode"]) == ("FAILED", 0, "1:0"), job.tell()
    told = job.output.read_text()
    assert re.search(r"^\[rank \d\] DataError: Source 'text'.*has token 200 at token", told, re.MULTILINE), told
    assert "lost its connection" not in told


# Stands for a start that takes longer than Slurm needs to see that a signal is due, half a minute.
SLOW_START = "import os, time\nif 'SLURM_PROCID' in os.environ: time.sleep(90)\n"


def test_a_time_limit_too_short_to_begin_is_refused_the_second_time(
    submit: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a job whose signal comes at once goes round for ever."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = submit("short", "--ntasks-per-node=1", "--time=2", "--signal=B:USR1@300", steps=ENDLESS)
    job.wait_until(lambda: job.state in ENDED, 4 * MINUTES)
    assert (job.state, job.restarts, job.last_step) == ("FAILED", 1, 0), job.tell()
    assert "--time must be longer" in job.output.read_text()


# Takes apptainer's place on the PATH: runs what stands behind the image, if the options before it are those expected.
APPTAINER = """#!/bin/bash
[ "$1 $2 $3 $5" = "exec --nv --bind --pwd" ] && [ "$6" = "$PWD" ] && [ "$7" = image.sif ] || exit 9
case "$4" in "$PWD,/corpus:/data") ;; *) exit 9 ;; esac
exec "${@:8}"
"""


@pytest.mark.parametrize("container", ["", "image.sif"])
def test_a_node_with_a_wrong_package_is_named_before_anything_starts(
    submit: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    """Fails if ranks start on a node that the doctor finds unfit, nobody says why they did not, or the doctor looks at
    the node where the ranks would be in a container."""
    package = tmp_path / "older" / "megatron_core-0.15.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    if container:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "apptainer").write_text(APPTAINER)
        (tmp_path / "bin" / "apptainer").chmod(0o755)
        monkeypatch.setattr("tests.slurm.cluster.SYSTEM_PATH", f"{tmp_path}/bin:{SYSTEM_PATH}")
        monkeypatch.setenv("CONTAINER", container)
        monkeypatch.setenv("CONTAINER_MOUNTS", "/corpus:/data")
    job = submit("unfit", "--ntasks-per-node=1", "--time=20", steps=ENDLESS)
    job.wait_until(lambda: job.state == "FAILED", 3 * MINUTES)
    output = job.output.read_text()
    assert "0.15.0, supported is megatron-core==0.16.1" in output
    assert "not fit to train on" in output
    assert not list((job.logs / "start_1").glob("rank_*"))
    assert not job.run_dir.exists()
