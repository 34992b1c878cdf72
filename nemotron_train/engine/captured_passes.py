"""A step's forward and backward passes as one CUDA graph: recorded once, and from then on started by a single call.

Where kernels are small (few tokens, a layer shared by many ranks, FP8) the GPU runs them faster than a CPU starts them.
A recorded graph starts itself, collectives included, and computes the same bits.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.tensor_parallel.random import get_all_rng_states
from torch import Tensor

from nemotron_train.data.batch import Batch

logger = logging.getLogger(__name__)

Passes = Callable[[Sequence[Batch], Tensor], list[Any]]  # micro-batches on the device, real tokens -> reports


@dataclass(frozen=True)
class _Recording:
    """A graph and the memory it reads its inputs from and leaves its results in."""

    graph: torch.cuda.CUDAGraph
    batches: list[Batch]
    tokens_in_step: Tensor
    reports: list[Any]


def _record(passes: Passes, batches: list[Batch], tokens_in_step: Tensor) -> _Recording:
    logger.info("Recording the passes of a step of %d micro-batches as a CUDA graph.", len(batches))
    graph = torch.cuda.CUDAGraph()
    for generator in get_all_rng_states().values():  # recomputation saves and restores them
        graph.register_generator_state(generator)
    # Errors of this thread alone: another one watches over collectives, and may call CUDA meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        reports = passes(batches, tokens_in_step)
    return _Recording(graph, batches, tokens_in_step, reports)


class CapturedPasses:
    """The graph of the passes in use. Make it before the model: what it captures must run on one stream."""

    def __init__(self) -> None:
        # A gradient is accumulated on the stream on which its parameter was first used. The default stream cannot be
        # captured, so the whole rank computes on this one.
        torch.cuda.set_stream(torch.cuda.Stream())
        self._warmed_up: list[torch.Size] | None = None
        self._recording: _Recording | None = None
        _all.add(self)

    def run(self, passes: Passes, batches: Sequence[Batch], tokens_in_step: Tensor) -> list[Any]:
        """Take a step's micro-batches, in host memory, through `passes`.

        The first step of as many micro-batches of these shapes runs as ever, because kernels tune themselves and make
        their workspaces; the second is recorded.

        Returns:
            the reports of `passes`. The next call overwrites them.
        """
        device = tokens_in_step.device
        shapes = [batch.tokens_BS.shape for batch in batches]
        on_device = [batch.to(device) for batch in batches]
        if shapes != self._warmed_up:
            self.release()
            self._warmed_up = shapes
            return passes(on_device, tokens_in_step)
        if self._recording is None:
            self._recording = _record(passes, on_device, tokens_in_step.clone())
        recording = self._recording
        recording.tokens_in_step.copy_(tokens_in_step)
        for kept, new in zip(recording.batches, on_device, strict=True):
            kept.copy_from(new)
        recording.graph.replay()
        return recording.reports

    def release(self) -> None:
        """Give the graph's memory back, and its hold on the communicators that it calls."""
        if self._recording is not None:
            torch.cuda.synchronize()
            self._recording.graph.reset()
            self._recording = None


_all: WeakSet[CapturedPasses] = WeakSet()


def release_all() -> None:
    """Release every graph of this process: communicators do not end while a graph holds them."""
    for passes in _all:
        passes.release()
