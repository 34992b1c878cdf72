"""Runs on a GPU go on bitwise, and checkpoints go between CPU and GPU."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_train.config.schema import PrecisionFormat, RunConfig
from tests.small_runs import read_metrics, small_config, train, write_corpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

STEPS = 12  # of 128 tokens a sample, four times what the small run has
SIZES = dict(
    hidden_size=256,
    ffn_hidden_size=512,
    attention_head_dim=64,
    mamba_num_heads=16,
    mamba_head_dim=64,
    mamba_state_dim=64,
    mamba_chunk_size=64,
)
DETERMINISTIC = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "MAMBA_DETERMINISTIC": "1"}


def config_in(
    tmp_path: Path, name: str, precision: PrecisionFormat, parallel: dict[str, Any] | None = None
) -> RunConfig:
    corpus = tmp_path / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        write_corpus(corpus)
    return small_config(
        corpus,
        tmp_path / name,
        steps=4 * STEPS,
        model=SIZES,
        precision={"format": precision},
        parallel=parallel or {},
        train={"seq_length": 128},
    )


def run_alone(config: RunConfig, stop_after: int | None = None, *, on_cpu: bool = False) -> None:
    """Train in a process of its own."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    command = [sys.executable, "-m", "tests.run.test_gpu_runs"]
    environment = {**os.environ, **DETERMINISTIC, **hidden}
    subprocess.run(command, input=pickle.dumps((config, stop_after)), env=environment, check=True)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir) if "loss" in record]


@pytest.mark.parametrize("precision", ["bf16", "fp8_block", "fp8_current", "fp8_delayed"])
def test_a_run_that_stopped_goes_on_bitwise(tmp_path: Path, precision: str) -> None:
    """Fails if a checkpoint forgets what a GPU run needs, the history of delayed scaling included, or if the quantised
    weights of a resumed run are others."""
    for name, stops in (("straight", [None]), ("stopped", [5, None])):
        for stop in stops:
            run_alone(config_in(tmp_path, name, PrecisionFormat(precision)), stop)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


@pytest.mark.parametrize("first_on_cpu", [True, False])
def test_a_checkpoint_goes_between_cpu_and_gpu(tmp_path: Path, first_on_cpu: bool) -> None:
    """Fails if Transformer Engine's layers and the plain ones store their weights differently."""
    config = config_in(tmp_path, "both", PrecisionFormat.bf16)
    run_alone(config, 5, on_cpu=first_on_cpu)
    run_alone(config, on_cpu=not first_on_cpu)
    run_alone(config_in(tmp_path, "gpu", PrecisionFormat.bf16))
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "gpu"), rel=5e-3)


if __name__ == "__main__":
    train(*pickle.loads(sys.stdin.buffer.read()))
