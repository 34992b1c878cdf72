"""Which steps run, which are captured and which are replayed, and on what?

On the CPU, with a stand-in for a graph: it runs the passes again, on the memory it was captured with.
`tests/run/test_cuda_graphs_on_gpu.py` has real ones.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_train.data.batch import Batch
from nemotron_train.engine import captured_passes
from nemotron_train.engine.captured_passes import CapturedPasses


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
    captured = CapturedPasses()
    assert [step(captured, log, 2, 8) for _ in range(4)] == [["run"], ["capture", "replay"], ["replay"], ["replay"]]
    assert [step(captured, log, 3, 8) for _ in range(2)] == [["reset", "run"], ["capture", "replay"]], "larger batches"
    assert [step(captured, log, 3, 16) for _ in range(2)] == [["reset", "run"], ["capture", "replay"]], "longer samples"
    assert step(captured, log, 2, 8) == ["reset", "run"], "shapes of long ago"


def test_a_closed_run_holds_no_graph(log: Log) -> None:
    """Fails if process groups would end while a graph holds their communicators."""
    captured = CapturedPasses()
    for _ in range(2):
        step(captured, log, 2, 8)
    log.clear()
    captured.close()
    assert log == ["reset"]
    captured.close()
    assert log == ["reset"]


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
