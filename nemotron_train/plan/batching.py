"""How the training tokens fall into steps: batch sizes, micro-batches, and the number of whole steps.

The state of training is one integer, the tokens consumed so far. All of this is arithmetic over the few segments of
the batch schedule, never a loop over steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemotron_train.config.schema import PhaseConfig, RunConfig, TrainSection


@dataclass(frozen=True)
class BatchSegment:
    """From the first step that starts at or after `start_tokens` on, steps take `global_batch_size` samples of
    `seq_length` tokens."""

    start_tokens: int
    global_batch_size: int
    seq_length: int

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length


@dataclass(frozen=True)
class BatchPlan:
    """Steps of a run. Segments rise in `start_tokens`, the first starts at 0."""

    train_tokens: int
    micro_batch_size: int
    data_parallel_size: int
    segments: tuple[BatchSegment, ...]

    @property
    def num_steps(self) -> int:
        """Return the steps of the whole run: as many whole ones as fit into `train_tokens`."""
        return self.steps_left(0)

    @property
    def consumed_at_end(self) -> int:
        """Return the tokens of a whole run: at most one step short of `train_tokens`."""
        return self.consumed_tokens_at(self.num_steps)

    def segment_at(self, consumed_tokens: int) -> BatchSegment:
        """Return what the step that starts after `consumed_tokens` takes."""
        return next(s for s in reversed(self.segments) if s.start_tokens <= consumed_tokens)

    def global_batch_size_at(self, consumed_tokens: int) -> int:
        return self.segment_at(consumed_tokens).global_batch_size

    def seq_length_at(self, consumed_tokens: int) -> int:
        return self.segment_at(consumed_tokens).seq_length

    def tokens_per_step_at(self, consumed_tokens: int) -> int:
        return self.segment_at(consumed_tokens).tokens_per_step

    def num_micro_batches_at(self, consumed_tokens: int) -> int:
        """Return the micro-batches that every data-parallel rank takes in the step after `consumed_tokens`."""
        return self.global_batch_size_at(consumed_tokens) // (self.micro_batch_size * self.data_parallel_size)

    def steps_left(self, consumed_tokens: int) -> int:
        """Return how many whole steps fit between `consumed_tokens` and `train_tokens`; 0: the run is finished."""
        steps = 0
        for segment, end in zip(self.segments, self._ends(), strict=True):
            tokens = segment.tokens_per_step
            wanted = _steps_to_pass(consumed_tokens, end, tokens)
            taken = min(wanted, max(self.train_tokens - consumed_tokens, 0) // tokens)
            steps += taken
            consumed_tokens += taken * tokens
            if taken < wanted:  # the next step does not fit, and a later segment is never reached
                break
        return steps

    def step_at(self, consumed_tokens: int) -> int:
        """Return how many steps are done.

        Counted from the end: a run that changed its batch size on the way, and so stands between two steps of this
        plan, still ends with step `num_steps`.
        """
        return self.num_steps - self.steps_left(consumed_tokens)

    def consumed_tokens_at(self, step: int) -> int:
        """Return the tokens that the first `step` steps take (`step` is at most `num_steps`)."""
        consumed = 0
        for segment, end in zip(self.segments, self._ends(), strict=True):
            tokens = segment.tokens_per_step
            taken = min(step, _steps_to_pass(consumed, end, tokens))
            consumed += taken * tokens
            step -= taken
        return consumed

    def step_at_or_after(self, tokens: int, consumed_tokens: int = 0) -> int:
        """Return at how many consumed tokens the first step at or after `tokens` starts, from `consumed_tokens` on."""
        following = [*(segment.start_tokens for segment in self.segments[1:]), tokens]
        for segment, end in zip(self.segments, following, strict=True):
            consumed_tokens += _steps_to_pass(consumed_tokens, min(end, tokens), segment.tokens_per_step) * (
                segment.tokens_per_step
            )
        return consumed_tokens

    def steps_by_segment(self) -> list[tuple[BatchSegment, int]]:
        """Return how many steps of a whole run each segment takes (0: the run ends before it)."""
        starts = [min(self.step_at_or_after(segment.start_tokens), self.consumed_at_end) for segment in self.segments]
        pairs = zip(self.segments, starts, [*starts[1:], self.consumed_at_end], strict=True)
        return [(segment, (following - start) // segment.tokens_per_step) for segment, start, following in pairs]

    def tokens_by_length(self) -> dict[int, int]:
        """Return how many tokens of a whole run come in samples of each length."""
        tokens: dict[int, int] = {}
        for segment, steps in self.steps_by_segment():
            tokens[segment.seq_length] = tokens.get(segment.seq_length, 0) + steps * segment.tokens_per_step
        return tokens

    @property
    def main_seq_length(self) -> int:
        """Return the sample length that most tokens of the run come in."""
        tokens = self.tokens_by_length()
        return max(tokens, key=lambda length: tokens[length])

    def _ends(self) -> list[int]:
        """Return where each segment ends: where the next one starts, or the run ends."""
        return [*(segment.start_tokens for segment in self.segments[1:]), self.train_tokens]


def _steps_to_pass(consumed_tokens: int, end: int, tokens_per_step: int) -> int:
    """Return the steps until `consumed_tokens` is at or over `end` (a segment's last step may reach into the next)."""
    return max(-(-(end - consumed_tokens) // tokens_per_step), 0)


def plan_batches(train: TrainSection, phases: Sequence[PhaseConfig], data_parallel_size: int) -> BatchPlan:
    """Lay out the steps; `plan.rules` has proved that every batch divides among the ranks."""
    batches = {
        0: train.global_batch_size,
        **{step.start_tokens: step.global_batch_size for step in train.batch_schedule},
    }
    lengths = {0: train.seq_length, **{phase.start_tokens: phase.seq_length or train.seq_length for phase in phases}}
    segments: list[BatchSegment] = []
    for start in sorted(batches.keys() | lengths.keys()):
        batch, length = _latest(batches, start), _latest(lengths, start)
        if not segments or (segments[-1].global_batch_size, segments[-1].seq_length) != (batch, length):
            segments.append(BatchSegment(start, batch, length))
    return BatchPlan(
        train_tokens=train.train_tokens,
        micro_batch_size=train.micro_batch_size,
        data_parallel_size=data_parallel_size,
        segments=tuple(segments),
    )


def _latest(values: Mapping[int, int], start: int) -> int:
    """Return the value that was set last at or before `start`."""
    return values[max(known for known in values if known <= start)]


def first_sample_length(config: RunConfig) -> tuple[str, int]:
    """Return the key that sets the sample length of the first step, and that length."""
    phases = config.data.phases
    if phases and phases[0].seq_length is not None:
        return "data.phases[0].seq_length", phases[0].seq_length
    return "train.seq_length", config.train.seq_length


def sample_lengths(config: RunConfig) -> list[tuple[str, int]]:
    """Return every length samples have in a run, with the key that sets it."""
    lengths = [("train.seq_length", config.train.seq_length)]
    for index, phase in enumerate(config.data.phases):
        if phase.seq_length is not None:
            lengths.append((f"data.phases[{index}].seq_length", phase.seq_length))
    return lengths
