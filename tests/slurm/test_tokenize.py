"""Does launch/slurm/tokenize.sbatch write what one process writes? Asked of the real Slurm."""

import sys
from pathlib import Path

import pytest

from data_tools.__main__ import main as data_tools
from tests.data_tools.text import files_of, texts, write_jsonl
from tests.slurm.cluster import Cluster, wait_until

pytestmark = pytest.mark.slurm


def test_an_array_of_jobs_writes_the_shards_of_a_single_process(
    cluster: Cluster, tokenizer_path: Path, tmp_path: Path
) -> None:
    """Fails if a task takes the wrong parts, two write the same shard, or none puts the shards together."""
    folder = tmp_path / "texts"
    folder.mkdir()
    inputs = [write_jsonl(folder / f"{n}.jsonl", texts(300, seed=n)) for n in range(7)]
    arguments = ["--input", *map(str, inputs), "--tokenizer", str(tokenizer_path), "--source", "web", "--shards", "3"]
    assert data_tools(["tokenize", *arguments, "--output", str(tmp_path / "single"), "--workers", "1"]) == 0
    job = cluster.submit(
        "--array=0-2", "--cpus-per-task=1", "--time=5", f"--output={tmp_path}/task_%a.out",
        "launch/slurm/tokenize.sbatch", *arguments, "--output", str(tmp_path / "array"), PYTHON=sys.executable,
    )  # fmt: skip
    outputs = lambda: "\n".join(path.read_text() for path in sorted(tmp_path.glob("task_*.out")))  # noqa: E731
    wait_until(lambda: cluster.states(job) <= {"COMPLETED", "FAILED"}, 180, outputs)
    assert cluster.states(job) == {"COMPLETED"}, outputs()
    assert "web_00002.bin" in files_of(tmp_path / "single")
    assert files_of(tmp_path / "array") == files_of(tmp_path / "single")
