"""Which micro-batches run, which are captured and which are replayed, and on what; and what of a run goes that way?

On the CPU, with stand-ins for CUDA: a graph keeps what is done while it is captured, and does it when it is replayed.
`tests/run/test_cuda_graphs_on_gpu.py` has the real ones.
"""

from collections.abc import Callable, Sequence
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
from nemotron_train.engine.captured_passes import CapturedPasses, Watched
from nemotron_train.loss import LossReport
from nemotron_train.step import run_all
from tests.engine.live import live_run, micro_batches, random_samples
from tests.ranks import RankPool
from tests.small_runs import logged, read_metrics, small_config, trainer_of

GENERATOR = torch.Generator()


def generators() -> dict[str, torch.Generator]:
    return {"model": GENERATOR}


class Graph:
    def __init__(self, log: "Log") -> None:
        self.log, self.work, self.generators = log, list[Callable[[], None]](), list[torch.Generator]()
        self.name = f"graph {log.graphs}"
        log.graphs += 1

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        assert self.generators == list(generators().values()), "recomputation would change those outside"
        self.log.append(self.name)
        for work in self.work:
            work()

    def reset(self) -> None:
        self.log.append(f"reset {self.name}")


class Log(list[str]):
    """What happened, and passes that write it down. Each report is the sum of a micro-batch's tokens and of the real
    tokens of its step."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs = 0
        self.capturing: Graph | None = None

    def passes(self, batches: Sequence[Batch], tokens_in_step: Tensor) -> list[Tensor]:
        self.append(f"capture {len(batches)}" if self.capturing else "run")
        return [self.report(batch, tokens_in_step) for batch in batches]

    def report(self, batch: Batch, tokens_in_step: Tensor) -> Tensor:
        report = torch.zeros((), dtype=torch.int64)

        def work() -> None:
            report.copy_(batch.tokens_BS.sum() + tokens_in_step)

        if self.capturing is None:
            work()
        else:
            self.capturing.work.append(work)
        return report


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()

    class Capturing:
        def __init__(self, graph: Graph, *options: Any, **more: Any) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            assert log.capturing is None, "one graph at a time"
            log.capturing = self.graph

        def __exit__(self, *error: object) -> None:
            log.capturing = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    for name in ("set_stream", "synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(log))
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    return log


def step(captured: CapturedPasses, log: Log, micro_batches: int, seq_length: int = 8) -> list[str]:
    """Take a step of new random tokens; returns what happened."""
    rows = torch.randint(1000, (micro_batches, 2, seq_length))
    batches = [Batch(row, row, torch.ones(2, seq_length), torch.zeros(2, dtype=torch.int64)) for row in rows.clone()]
    tokens = torch.randint(1000, ())
    log.clear()
    reports = captured.run(log.passes, batches, tokens)
    assert [int(report) for report in reports] == [int(row.sum() + tokens) for row in rows]
    return list(log)


FIRST, BETWEEN, LAST = "graph 0", "graph 1", "graph 2"


def test_a_graph_does_for_all_micro_batches_between_the_first_and_the_last(log: Log) -> None:
    """Fails if a graph is captured before its kernels have run, holds more than its micro-batch, knows no random
    generators, or leaves one micro-batch the tokens or the report of another; or if a larger batch is captured
    again."""
    captured = CapturedPasses(generators, in_pipeline=False)
    assert step(captured, log, 4) == ["run"]
    assert step(captured, log, 4) == ["capture 3", FIRST, BETWEEN, BETWEEN, LAST]
    assert step(captured, log, 4) == [FIRST, BETWEEN, BETWEEN, LAST]
    assert step(captured, log, 6) == [FIRST, *[BETWEEN] * 4, LAST]
    assert step(captured, log, 3) == [FIRST, BETWEEN, LAST]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_fewer_micro_batches_have_a_graph_each(log: Log, micro_batches: int) -> None:
    """Fails if the only micro-batch is captured as the first of more, or a second one as one before a third: neither
    would reduce gradients."""
    captured = CapturedPasses(generators, in_pipeline=False)
    graphs = [FIRST, BETWEEN][:micro_batches]
    expected = [["run"], [f"capture {micro_batches}", *graphs], graphs]
    assert [step(captured, log, micro_batches) for _ in range(3)] == expected


def test_a_pipeline_has_one_graph_for_its_step(log: Log) -> None:
    """Fails if micro-batches that a pipeline interleaves are taken apart, or a graph does for another number."""
    captured = CapturedPasses(generators, in_pipeline=True)
    assert [step(captured, log, 4) for _ in range(3)] == [["run"], ["capture 4", "graph 0"], ["graph 0"]]
    assert [step(captured, log, 6) for _ in range(2)] == [["reset graph 0", "run"], ["capture 6", "graph 1"]]


@pytest.mark.parametrize("in_pipeline", [False, True])
def test_samples_of_another_length_are_captured_anew(log: Log, in_pipeline: bool) -> None:
    """Fails if longer samples go through graphs of shorter ones, or those are kept beside."""
    captured = CapturedPasses(generators, in_pipeline=in_pipeline)
    for _ in range(2):
        step(captured, log, 2)
    first, second = step(captured, log, 2, seq_length=16), step(captured, log, 2, seq_length=16)
    assert first[-1] == "run"
    assert "reset graph 0" in first
    assert second[0] == "capture 2"


def test_a_closed_run_holds_no_graph(log: Log) -> None:
    """Fails if process groups would end while a graph holds their communicators."""
    captured = CapturedPasses(generators, in_pipeline=False)
    for _ in range(2):
        step(captured, log, 3)
    log.clear()
    captured.close()
    assert log == [f"reset {graph}" for graph in (FIRST, BETWEEN, LAST)]
    captured.close()
    assert len(log) == 3


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


def test_a_failed_capture_names_the_option(log: Log) -> None:
    """Fails if a user is told of a capture alone, which no key of the configuration is called."""

    def passes(batches: Sequence[Batch], tokens_in_step: Tensor) -> list[Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing\. train\.cuda_graphs=false"):
        captured_passes.capture(passes, [], torch.ones(()), generators, one_each=True)


def gradients_when_the_next_is_taken(config: RunConfig) -> list[float]:
    """The sum of the gradient that is the last to be computed, before each micro-batch but the first and at the end."""
    with live_run(config) as run:
        gradient = run.chunks[0].module.embedding.word_embeddings.weight.main_grad
        sums: list[float] = []

        def watch(passes: Any, batches: Sequence[Batch], tokens_in_step: Tensor) -> list[LossReport]:
            watched = Watched(batches, lambda: sums.append(float(gradient.abs().sum())))
            return passes(watched, tokens_in_step)

        captured = SimpleNamespace(run=watch)
        batches = micro_batches(random_samples(0, 8, config), 2)
        run_all(replace(run, captured=captured), batches, forward_only=False)  # type: ignore[arg-type]
        return [*sums, float(gradient.abs().sum())]


def test_the_schedule_is_done_with_a_micro_batch_before_it_takes_the_next(
    ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """Fails if Megatron-Core's schedule takes a micro-batch early: its graph would hold work of another."""
    (sums,) = ranks.run(gradients_when_the_next_is_taken, 1, small_config(corpus, tmp_path))
    assert len(sums) == 4
    assert 0 < sums[0] < sums[1] < sums[2] < sums[3]
