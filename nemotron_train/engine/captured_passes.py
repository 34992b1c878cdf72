"""A step's forward and backward passes as one CUDA graph: captured once, and from then on started by a single call.

Where kernels are small (few tokens, a layer shared by many ranks, FP8) the GPU runs them faster than a CPU starts them.
A graph starts itself, collectives included, and runs the same kernels on the same memory.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_all_rng_states, model_parallel_cuda_manual_seed
from torch import Tensor

from nemotron_train.data.batch import Batch

logger = logging.getLogger(__name__)

Passes = Callable[[Sequence[Batch], Tensor], list[Any]]  # micro-batches on the device, real tokens -> reports


@dataclass(frozen=True)
class _Capture:
    """A graph, and the memory it reads its inputs from and leaves its results in."""

    graph: torch.cuda.CUDAGraph
    batches: Sequence[Batch]
    tokens_in_step: Tensor
    reports: list[Any]


class CapturedPasses:
    """The graph of the passes in use.

    Make it before the model. From then on this rank computes on a stream of its own, until `close`: the default stream
    cannot be captured, and a gradient is accumulated on the stream on which its parameter was first used.
    """

    def __init__(self, seed: int) -> None:
        # Recomputation saves and restores the random generators, which nothing draws from. A graph takes a kind of its
        # own.
        model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=True, force_reset_rng=True)
        self._outer = torch.cuda.current_stream()
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(self._outer)
        torch.cuda.set_stream(self._stream)
        self._warmed_up: list[torch.Size] | None = None
        self._capture: _Capture | None = None

    def run(self, passes: Passes, batches: Sequence[Batch], tokens_in_step: Tensor) -> list[Any]:
        """Take a step's micro-batches, in host memory, through `passes`.

        The first step of as many micro-batches of these shapes runs as ever, because kernels tune themselves and make
        their workspaces; the second is captured.

        Returns:
            the reports of `passes`. The next call overwrites them.
        """
        shapes = [batch.tokens_BS.shape for batch in batches]
        on_device = [batch.to(tokens_in_step.device) for batch in batches]
        if shapes != self._warmed_up:
            self.release()
            self._warmed_up = shapes
            return passes(on_device, tokens_in_step)
        if self._capture is None:
            self._capture = capture(passes, on_device, tokens_in_step.clone())
        kept = self._capture
        kept.tokens_in_step.copy_(tokens_in_step)
        for old, new in zip(kept.batches, on_device, strict=True):
            old.copy_from(new)
        kept.graph.replay()
        return kept.reports

    def release(self) -> None:
        """Give the graph's memory back, and its hold on the communicators that it calls."""
        if self._capture is not None:
            torch.cuda.synchronize()
            self._capture.graph.reset()
            self._capture = None

    def close(self) -> None:
        """Release the graph, and compute on the stream that was used before. Process groups end after it: they wait
        for graphs that hold their communicators."""
        self.release()
        self._outer.wait_stream(self._stream)
        torch.cuda.set_stream(self._outer)


def capture(passes: Passes, batches: Sequence[Batch], tokens_in_step: Tensor) -> _Capture:
    """Let `passes` say what they do, without doing it.

    Raises:
        RuntimeError: something in them cannot be captured.
    """
    logger.info("Capturing the passes of a step of %d micro-batches as a CUDA graph.", len(batches))
    graph = torch.cuda.CUDAGraph()
    for generator in get_all_rng_states().values():
        graph.register_generator_state(generator)
    try:
        # Errors of this thread alone: another one watches over collectives, and may call CUDA meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            reports = passes(batches, tokens_in_step)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"The passes of a step cannot be captured as a CUDA graph: {error}. train.cuda_graphs=false runs them "
            "without."
        ) from error
    return _Capture(graph, batches, tokens_in_step, reports)
