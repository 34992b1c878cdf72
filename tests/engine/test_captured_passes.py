"""Which steps run, which are captured and which are replayed, and on what; and what of a run goes that way?

On the CPU, with a stand-in for a graph: it runs the passes again, on the memory it was captured with.
`tests/run/test_cuda_graphs_on_gpu.py` has real ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_train.config.schema import RunConfig
from nemotron_train.data.batch import Batch
from nemotron_train.engine import captured_passes
from nemotron_train.engine.captured_passes import CapturedPasses
from nemotron_train.loss import LossReport
from tests.ranks import RankPool
from tests.small_runs import logged, read_metrics, small_config, trainer_of


class Log(list[str]):
    """What happened, and passes and a capture that write it down."""

    def passes(self, batches: Sequence[Batch], tokens_in_step: Tensor) -> list[Tensor]:
        self.append("run")
        return [batch.tokens_BS.sum() + tokens_in_step for batch in batches]

    def capture(self, passes: Any, batches: Sequence[Batch], tokens_in_step: Tensor) -> Any:
        self.append("capture")
        reports = [torch.zeros((), dtype=torch.int64) for _ in batches]

        def replay() -> None:
            self.append("replay")
            for report, batch in zip(reports, batches, strict=True):
                report.copy_(batch.tokens_BS.sum() + tokens_in_step)

        graph = SimpleNamespace(replay=replay, reset=lambda: self.append("reset"))
        return captured_passes._Capture(graph, batches, tokens_in_step, reports)  # type: ignore[arg-type]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    for name in ("set_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(captured_passes, "capture", log.capture)
    monkeypatch.setattr(captured_passes, "model_parallel_cuda_manual_seed", lambda seed, **options: None)
    return log


def step(captured: CapturedPasses, log: Log, micro_batches: int, seq_length: int) -> list[str]:
    """Take a step of new random tokens; returns what happened."""
    rows = torch.randint(1000, (micro_batches, 2, seq_length))
    batches = [Batch(row, row, torch.ones(2, seq_length), torch.zeros(2, dtype=torch.int64)) for row in rows]
    tokens = torch.randint(1000, ())
    log.clear()
    reports = captured.run(log.passes, batches, tokens)
    assert [int(report) for report in reports] == [int(row.sum() + tokens) for row in rows]
    return list(log)


def test_steps_of_the_same_shapes_share_a_graph(log: Log) -> None:
    """Fails if a graph is captured before its kernels have run, used for other shapes, kept beside the next one, or
    reads another step's tokens."""
    captured = CapturedPasses(seed=1)
    assert [step(captured, log, 2, 8) for _ in range(4)] == [["run"], ["capture", "replay"], ["replay"], ["replay"]]
    assert [step(captured, log, 3, 8) for _ in range(2)] == [["reset", "run"], ["capture", "replay"]], "larger batches"
    assert [step(captured, log, 3, 16) for _ in range(2)] == [["reset", "run"], ["capture", "replay"]], "longer samples"
    assert step(captured, log, 2, 8) == ["reset", "run"], "shapes of long ago"


def test_a_closed_run_holds_no_graph(log: Log) -> None:
    """Fails if process groups would end while a graph holds their communicators."""
    captured = CapturedPasses(seed=1)
    for _ in range(2):
        step(captured, log, 2, 8)
    log.clear()
    captured.close()
    assert log == ["reset"]
    captured.close()
    assert log == ["reset"]


class Counted:
    """Stands for captured passes in a run: counts the steps that come to it, and runs them as ever."""

    steps, closed = 0, False

    def run(self, passes: Any, batches: Sequence[Batch], tokens_in_step: Tensor) -> list[LossReport]:
        assert not self.closed
        self.steps += 1
        return passes(batches, tokens_in_step)

    def close(self) -> None:
        self.closed = True


def train_counted(config: RunConfig) -> tuple[int, bool, list[float]]:
    counted = Counted()
    with trainer_of(config) as trainer:
        trainer.run = replace(trainer.run, captured=counted)  # type: ignore[arg-type]
        trainer.train()
    return counted.steps, counted.closed, logged("eval_loss", read_metrics(Path(config.run.dir)))


def test_steps_are_captured_and_evaluations_are_not(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if training goes past its graph, an evaluation goes through it, or it outlives the run."""
    config = small_config(corpus, tmp_path, steps=8, train={"eval_every_steps": 4})
    ((steps, closed, evaluations),) = ranks.run(train_counted, 1, config)
    assert (steps, closed, len(evaluations)) == (8, True, 2)


def test_a_failed_capture_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a user is told of a capture alone, which no key of the configuration is called."""

    def passes(batches: Sequence[Batch], tokens_in_step: Tensor) -> list[Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    class Capturing:
        def __init__(self, graph: Any, **options: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(captured_passes, "get_all_rng_states", dict)
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing\. train\.cuda_graphs=false"):
        captured_passes.capture(passes, [], torch.ones(()))
