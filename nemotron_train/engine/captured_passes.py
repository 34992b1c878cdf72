"""A step's forward and backward passes as CUDA graphs: captured once, and from then on started by a few calls.

Where kernels are small (few tokens, a layer shared by many ranks, FP8) the GPU runs them faster than a CPU starts them.
A graph starts itself, collectives included, and runs the same kernels on the same memory.

Without a pipeline a rank takes one micro-batch after the other, and only the first and the last differ from the rest:
the first quantises weights and overwrites gradients, the last reduces them. Three graphs do for any number of
micro-batches. A pipeline's schedule interleaves them, and its graph holds the whole step.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_all_rng_states, model_parallel_cuda_manual_seed
from torch import Tensor

from nemotron_train.data.batch import Batch

logger = logging.getLogger(__name__)

Passes = Callable[[Sequence[Batch], Tensor], list[Any]]  # micro-batches on the device, real tokens -> reports
Generators = Callable[[], Mapping[str, torch.Generator]]  # those in use now, by name; forking them may make others


def graph_safe_generators(seed: int) -> Generators:
    """Give Megatron-Core random generators of the kind that a graph takes. Nothing draws from them; recomputation saves
    and restores them."""
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=True, force_reset_rng=True)
    return get_all_rng_states


@dataclass(frozen=True)
class _Part:
    """A graph, the micro-batches that it reads and the reports that it leaves."""

    graph: torch.cuda.CUDAGraph
    batches: Sequence[Batch]
    reports: Sequence[Any]


@dataclass(frozen=True)
class _Captured:
    """A graph for the whole step, or for each kind of micro-batch, and where they read the real tokens of the step."""

    parts: Sequence[_Part]
    tokens_in_step: Tensor


class CapturedPasses:
    """The graphs of the passes in use.

    Make it before the model. From then on this rank computes on a stream of its own, until `close`: the default stream
    cannot be captured, and a gradient is accumulated on the stream on which its parameter was first used.
    """

    def __init__(self, generators: Generators, *, in_pipeline: bool) -> None:
        """Args:
        generators: every graph is told of them, so that what recomputation does to them is part of it.
        """
        self._generators, self._in_pipeline = generators, in_pipeline
        self._outer = torch.cuda.current_stream()
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(self._outer)
        torch.cuda.set_stream(self._stream)
        self._warmed_up: list[torch.Size] | None = None
        self._captured: _Captured | None = None

    def run(self, passes: Passes, batches: Sequence[Batch], tokens_in_step: Tensor) -> list[Any]:
        """Take a step's micro-batches, in host memory, through `passes`; returns their reports.

        The first step that needs other graphs runs as ever, because kernels tune themselves and make their workspaces;
        the second is captured.
        """
        on_device = [batch.to(tokens_in_step.device) for batch in batches]
        needed = on_device if self._in_pipeline else one_of_each_kind(on_device)
        shapes = [batch.tokens_BS.shape for batch in needed]
        if shapes != self._warmed_up:
            self.release()
            self._warmed_up = shapes
            return passes(on_device, tokens_in_step)
        if self._captured is None:
            tokens = tokens_in_step.clone()
            parts = capture(passes, needed, tokens, self._generators, one_each=not self._in_pipeline)
            self._captured = _Captured(parts, tokens)
        self._captured.tokens_in_step.copy_(tokens_in_step)
        reports: list[Any] = []
        new = iter(on_device)
        for part in in_order(self._captured.parts, len(on_device)):
            for batch in part.batches:
                batch.copy_from(next(new))
            part.graph.replay()
            reports += copy.deepcopy(part.reports)  # before a graph that runs again overwrites them
        return reports

    def release(self) -> None:
        """Give the graphs' memory back, and their hold on the communicators that they call."""
        if self._captured is not None:
            torch.cuda.synchronize()
            for part in self._captured.parts:
                part.graph.reset()
        self._captured = None

    def close(self) -> None:
        """Release the graphs, and compute on the stream that was used before. Process groups end after it: they wait
        for graphs that hold their communicators."""
        self.release()
        self._outer.wait_stream(self._stream)
        torch.cuda.set_stream(self._outer)


def one_of_each_kind(batches: Sequence[Batch]) -> list[Batch]:
    """Return micro-batches of a step without a pipeline that stand for all: the first, one between and the last."""
    return [batches[0], batches[1], batches[-1]] if len(batches) > 2 else list(batches)


def in_order(parts: Sequence[_Part], micro_batches: int) -> Sequence[_Part]:
    """Return the parts of a step of so many micro-batches, the one between as often as it is needed."""
    if len(parts) < 3:
        return parts
    first, between, last = parts
    return [first, *[between] * (micro_batches - 2), last]


class Watched(Sequence[Batch]):
    """Micro-batches that say when the next one is taken."""

    def __init__(self, batches: Sequence[Batch], before_next: Callable[[], None]) -> None:
        self._batches, self._before_next = batches, before_next

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(self._batches):
            if index:
                self._before_next()
            yield batch


def capture(
    passes: Passes, batches: Sequence[Batch], tokens_in_step: Tensor, generators: Generators, *, one_each: bool
) -> list[_Part]:
    """Let `passes` say what they do, without doing it.

    Args:
        one_each: a graph for each micro-batch; `passes` must be done with one when they take the next.

    Raises:
        RuntimeError: something in them cannot be captured.
    """
    logger.info("Capturing a step's passes (CUDA graphs: %d).", len(batches) if one_each else 1)
    graphs: list[torch.cuda.CUDAGraph] = []
    # Shared memory. What one graph leaves to another (the schedule's count of tokens) or to us (reports) is alive until
    # all are captured, so no other graph is given its memory.
    pool = torch.cuda.graph_pool_handle()

    def begin_graph() -> None:
        capturing.close()
        graph = torch.cuda.CUDAGraph()
        for generator in generators().values():
            graph.register_generator_state(generator)
        # Errors of this thread alone: another one watches over collectives, and may call CUDA meanwhile.
        stream = torch.cuda.current_stream()
        capturing.enter_context(torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"))
        graphs.append(graph)

    try:
        with ExitStack() as capturing:
            begin_graph()  # before the schedule makes anything that later graphs use
            reports = passes(Watched(batches, begin_graph) if one_each else batches, tokens_in_step)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"The passes of a step cannot be captured as CUDA graphs: {error}. train.cuda_graphs=false runs them "
            "without."
        ) from error
    if not one_each:
        return [_Part(graphs[0], batches, reports)]
    return [_Part(*part) for part in zip(graphs, [[b] for b in batches], [[r] for r in reports], strict=True)]
