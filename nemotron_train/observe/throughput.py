"""How fast is the run? Times steps and turns them into tokens/s and model TFLOP/s per GPU and the time left.

"GPU" means rank: on a CPU run it is one process. FLOPs are the model's (plan.sizes), so recomputation earns nothing.
Evaluation and checkpoints lie between `finish` and the next `start` and are not counted.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

RECENT_STEPS = 50  # the time left follows the speed of this many steps, so that it adapts to a changed batch size


@dataclass(frozen=True, kw_only=True)
class StepSpeed:
    """Field names are those of `metrics.METRICS`."""

    step_seconds: float
    tokens_per_second_per_gpu: float
    model_tflops_per_gpu: float
    seconds_left: float

    def as_record(self) -> dict[str, float]:
        return asdict(self)


class StepTimer:
    """Call `start` before a step and `finish` after it. The time left leaves the first steps of the process out: they
    pay for compilation, autotuning and memory that later ones do not."""

    def __init__(
        self,
        *,
        num_ranks: int,
        train_tokens: int,
        warmup_steps: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args:
        train_tokens: where the run ends, for the time left.
        """
        self._num_ranks = num_ranks
        self._train_tokens = train_tokens
        self._warmup_left = warmup_steps
        self._clock = clock
        self._started: float | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)

    def start(self) -> None:
        self._started = self._clock()

    def finish(self, *, step_tokens: int, consumed_tokens: int, flops_per_token: float) -> StepSpeed:
        """Return this step's speed. On a GPU, synchronise first: launches return before the work is done.

        Args:
            step_tokens: tokens of this step over all ranks.
            consumed_tokens: of the run, this step included.
            flops_per_token: model FLOPs of forward and backward; they depend on the length of the samples.
        """
        assert self._started is not None, "finish() without start()"
        seconds = self._clock() - self._started
        self._started = None
        if self._warmup_left:
            self._warmup_left -= 1
            recent_tokens, recent_seconds = step_tokens, seconds  # the best guess there is yet
        else:
            self._recent.append((step_tokens, seconds))
            recent_tokens = sum(tokens for tokens, _ in self._recent)
            recent_seconds = sum(seconds for _, seconds in self._recent)
        tokens_per_second = step_tokens / seconds / self._num_ranks
        return StepSpeed(
            step_seconds=seconds,
            tokens_per_second_per_gpu=tokens_per_second,
            model_tflops_per_gpu=tokens_per_second * flops_per_token / 1e12,
            seconds_left=max(self._train_tokens - consumed_tokens, 0) * recent_seconds / recent_tokens,
        )
