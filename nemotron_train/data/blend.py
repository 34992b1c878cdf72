"""Which tokens are sample g of the run? Pure arithmetic on (phases, token counts of the sources, seed); nothing is
stored or counted.

    g ──phase──▶ k-th sample of the phase ──interleave──▶ r-th window of a source ──permutation──▶ tokens

The stream of a source is its tokens over and over: epoch 0, 1, 2, ... Each epoch starts at another token (a keyed
rotation), so the cuts between windows fall elsewhere every time. The endless stream is cut into windows of
seq_length tokens; those that begin in one epoch are drawn in a keyed random order. So every token is used exactly
once an epoch, across phases. One window an epoch runs over its end and goes on where the next epoch starts; that is
why a location is a list of spans.

What sample g is depends on nothing after g: not on the length of the run, of the current phase, or on later phases.
That is also why a change of seq_length starts a new epoch of a source: the windows left over lie scattered, and
cannot be read as longer ones.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from nemotron_train.data.interleave import Interleave
from nemotron_train.data.permutation import Permutation
from nemotron_train.errors import ConfigError

FORMAT = 2  # part of `past_hash`: raise it when the same plan would give other samples than before


@dataclass(frozen=True)
class Phase:
    """From the first sample at or after `start_tokens` on, windows of `seq_length` tokens are drawn by weight."""

    start_tokens: int
    seq_length: int
    weights: Mapping[str, float]  # of sources by name, >= 0; only their ratios count


@dataclass(frozen=True)
class Span:
    """`count` tokens of a source's stream from `start` on, wrapping at its end."""

    start: int
    count: int


@dataclass(frozen=True)
class SampleLocation:
    """Where the seq_length + 1 tokens of a sample lie: one span, or two where it runs over the end of an epoch."""

    phase: int
    source: int  # position in BlendPlan.source_names
    epoch: int
    spans: tuple[Span, ...]

    @property
    def start_token(self) -> int:
        return self.spans[0].start


@dataclass(frozen=True)
class _Progress:
    """How far a source is when a phase begins: `windows` windows were drawn since the start of epoch `first_epoch`."""

    first_epoch: int
    windows: int
    seq_length: int


@dataclass(frozen=True)
class _PlacedPhase:
    """A phase with everything that follows from the phases before it."""

    number: int  # in the list the plan was made from
    first_sample: int
    first_token: int  # tokens of all samples before the phase
    seq_length: int
    interleave: Interleave
    progress: Mapping[str, _Progress]  # of the sources drawn in this phase, at its start


class BlendPlan:
    """Maps sample numbers to tokens. Immutable; equal arguments give equal samples on every machine and rank."""

    def __init__(self, phases: Sequence[Phase], source_tokens: Mapping[str, int], seed: int) -> None:
        """Place the phases one after the other.

        Args:
            source_tokens: tokens in each source by name; its order numbers the sources.

        Raises:
            ConfigError: the phases do not start at 0 and rise, a weight or source name is impossible, or a source is
                shorter than one window.
        """
        check_phases(phases, source_tokens)
        self.source_names = tuple(source_tokens)
        self._numbers = {name: number for number, name in enumerate(source_tokens)}
        self._tokens = dict(source_tokens)
        self._seed = seed
        self._phases = self._place(phases)
        self._first_samples = [phase.first_sample for phase in self._phases]
        self._first_tokens = [phase.first_token for phase in self._phases]

    def locate(self, sample: int) -> SampleLocation:
        """Return where sample number `sample` (from 0) of the run lies."""
        phase = self._phases[bisect_right(self._first_samples, sample) - 1]
        name, drawn = phase.interleave.draw(sample - phase.first_sample)
        progress = phase.progress[name]
        epoch, spans = self._window(name, phase.seq_length, progress.first_epoch, progress.windows + drawn)
        return SampleLocation(phase.number, self._numbers[name], epoch, spans)

    def sample_at(self, consumed_tokens: int) -> int:
        """Return the number of the sample that comes after `consumed_tokens` tokens.

        Raises:
            ConfigError: that many tokens are no whole number of samples.
        """
        phase = self._phases[bisect_right(self._first_tokens, consumed_tokens) - 1]
        samples, rest = divmod(consumed_tokens - phase.first_token, phase.seq_length)
        if rest:
            raise ConfigError(
                f"{consumed_tokens} consumed tokens are no whole number of samples of {phase.seq_length} tokens "
                f"(phase {phase.number} starts at {phase.first_token}). Was train.seq_length or data.phases changed?"
            )
        return phase.first_sample + samples

    def tokens_before(self, sample: int) -> int:
        """Return how many tokens the samples 0 ... sample-1 hold: the inverse of `sample_at`."""
        phase = self._phases[bisect_right(self._first_samples, sample) - 1]
        return phase.first_token + (sample - phase.first_sample) * phase.seq_length

    def past_hash(self, consumed_tokens: int) -> str:
        """Return the SHA-256 of everything that determined the samples before `consumed_tokens`.

        Plans with equal hashes gave equal samples so far, whatever they hold for the future. Of the shards, only the
        number of tokens is part of it.
        """
        past = []
        drawn: dict[str, int] = {}
        for phase, end in self._phases_until(self.sample_at(consumed_tokens)):
            weights = phase.interleave.weights
            past.append({"samples": end - phase.first_sample, "seq_length": phase.seq_length, "weights": weights})
            drawn.update((name, self._tokens[name]) for name in weights)
        canonical = {"format": FORMAT, "seed": self._seed, "phases": past, "sources": drawn}
        return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def epochs(self, total_tokens: int) -> dict[str, tuple[float, ...]]:
        """Return how often each source is read in each phase of a run of `total_tokens`."""
        epochs = {name: [0.0] * (self._phases[-1].number + 1) for name in self.source_names}
        last = self._phases[bisect_right(self._first_tokens, total_tokens) - 1]
        samples = last.first_sample + -(-(total_tokens - last.first_token) // last.seq_length)
        for phase, end in self._phases_until(samples):
            for name, windows in phase.interleave.counts_before(end - phase.first_sample).items():
                epochs[name][phase.number] = windows * phase.seq_length / self._tokens[name]
        return {name: tuple(values) for name, values in epochs.items()}

    def _place(self, phases: Sequence[Phase]) -> list[_PlacedPhase]:
        placed: list[_PlacedPhase] = []
        progress: dict[str, _Progress] = {}
        sample, token = 0, 0
        for number, phase in enumerate(phases):
            weights = {name: weight for name, weight in phase.weights.items() if weight > 0}
            interleave = Interleave(weights)
            begun = {name: self._progress_for(name, phase.seq_length, progress.get(name)) for name in weights}
            placed.append(_PlacedPhase(number, sample, token, phase.seq_length, interleave, begun))
            if number + 1 == len(phases):
                break
            samples = max(0, -(-(phases[number + 1].start_tokens - token) // phase.seq_length))
            if samples == 0:  # shorter than the sample that was under way: it never gets its turn, and leaves no trace
                placed.pop()
                continue
            for name, drawn in interleave.counts_before(samples).items():
                before = begun[name]
                progress[name] = _Progress(before.first_epoch, before.windows + drawn, before.seq_length)
            sample, token = sample + samples, token + samples * phase.seq_length
        return placed

    def _progress_for(self, name: str, seq_length: int, before: _Progress | None) -> _Progress:
        """Return where a source goes on: at the next epoch, if its windows had another length before."""
        if before is None or before.windows == 0:
            return _Progress(before.first_epoch if before else 0, 0, seq_length)
        if before.seq_length == seq_length:
            return before
        begun_epochs = -(-before.windows * before.seq_length // self._tokens[name])
        return _Progress(before.first_epoch + begun_epochs, 0, seq_length)

    def _window(self, name: str, seq_length: int, first_epoch: int, window: int) -> tuple[int, tuple[Span, ...]]:
        """Return the epoch and the tokens of the `window`-th window a source gives since the start of `first_epoch`."""
        tokens = self._tokens[name]
        since = window * seq_length // tokens  # whole epochs since first_epoch
        first = -(-since * tokens // seq_length)  # windows that begin before this epoch
        beyond = -(-(since + 1) * tokens // seq_length)
        epoch = first_epoch + since
        shuffled = first + _epoch_order(self._seed, name, epoch, beyond - first)(window - first)
        offset = shuffled * seq_length - since * tokens  # from the start of the epoch
        left = tokens - offset
        start = (_epoch_origin(self._seed, name, epoch, tokens) + offset) % tokens
        if left > seq_length:
            return epoch, (Span(start, seq_length + 1),)
        following = _epoch_origin(self._seed, name, epoch + 1, tokens)
        return epoch, (Span(start, left), Span(following, seq_length + 1 - left))

    def _phases_until(self, sample: int) -> list[tuple[_PlacedPhase, int]]:
        """Return the phases that have samples before `sample`, each with the end of those samples."""
        ends = [*self._first_samples[1:], sample]
        pairs = zip(self._phases, ends, strict=True)
        return [(phase, min(end, sample)) for phase, end in pairs if phase.first_sample < sample]


def check_phases(phases: Sequence[Phase], source_tokens: Mapping[str, int]) -> None:
    """Raise ConfigError if phases cannot be drawn from these sources."""
    if not phases or phases[0].start_tokens != 0:
        starts = [phase.start_tokens for phase in phases]
        raise ConfigError(f"data.phases start at {starts} tokens; the first must be there and start at 0.")
    for number, phase in enumerate(phases):
        key = f"data.phases[{number}]"
        if number and phase.start_tokens <= phases[number - 1].start_tokens:
            raise ConfigError(
                f"{key}.start_tokens={phase.start_tokens} does not come after the phase before it "
                f"({phases[number - 1].start_tokens})."
            )
        for name, weight in phase.weights.items():
            _check_weight(f"{key}.weights", name, weight, source_tokens)
            if weight > 0 and source_tokens[name] <= phase.seq_length:
                raise ConfigError(
                    f"Source {name!r} has {source_tokens[name]} tokens; {key} needs at least "
                    f"{phase.seq_length + 1} for one window (train.seq_length + 1)."
                )
        if not any(weight > 0 for weight in phase.weights.values()):
            raise ConfigError(f"{key}.weights has no source with a weight above 0.")


def _check_weight(key: str, name: str, weight: float, source_tokens: Mapping[str, int]) -> None:
    if name not in source_tokens:
        raise ConfigError(f"{key} names source {name!r}; data.sources has {', '.join(source_tokens)}.")
    if not math.isfinite(weight) or weight < 0:
        raise ConfigError(f"{key} gives source {name!r} the weight {weight}; it must be a number >= 0.")


def _key(*parts: int | str) -> int:
    """Return 64 bits that follow from the parts alone, on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


@lru_cache(maxsize=4096)
def _epoch_order(seed: int, name: str, epoch: int, windows: int) -> Permutation:
    return Permutation(windows, _key(seed, "order", name, epoch))


@lru_cache(maxsize=4096)
def _epoch_origin(seed: int, name: str, epoch: int, tokens: int) -> int:
    """Return the token at which an epoch of a source starts."""
    return _key(seed, "origin", name, epoch) % tokens
