"""Which tokens are sample g of the run? Pure arithmetic on (phases, token counts of the sources, seed); nothing is
stored or counted.

    g ──phase──▶ k-th sample of the phase ──interleave──▶ r-th sample of a source ──source order──▶ tokens

What sample g is depends on nothing after g: not on the length of the run, of the current phase, or on later phases.
A source reads on from where the earlier phase left it, whatever the length of its samples was there.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron_train.data.interleave import Interleave
from nemotron_train.data.source_order import SampleLength, SourceOrder, Span
from nemotron_train.errors import ConfigError

FORMAT = 3  # part of `past_hash`: raise it when the same plan would give other samples than before


@dataclass(frozen=True)
class Phase:
    """From the first sample at or after `start_tokens` on, windows of `seq_length` tokens are drawn by weight."""

    start_tokens: int
    seq_length: int
    weights: Mapping[str, float]  # of sources by name, >= 0; only their ratios count
    fim_rates: Mapping[str, float] = field(default_factory=dict)  # of documents rearranged, by source; absent: 0


@dataclass(frozen=True)
class SampleLocation:
    """Where the seq_length + 1 tokens of a sample lie: one span, but for those that run over the end of an epoch or
    were begun with samples of another length."""

    phase: int
    source: int  # position in BlendPlan.source_names
    epoch: int
    spans: tuple[Span, ...]
    fim_rate: float  # of its documents, rearranged

    @property
    def start_token(self) -> int:
        return self.spans[0].start


@dataclass(frozen=True)
class _PlacedPhase:
    """A phase with everything that follows from the phases before it."""

    number: int  # in the list the plan was made from
    first_sample: int
    first_token: int  # tokens of all samples before the phase
    seq_length: int
    interleave: Interleave
    fim_rates: Mapping[str, float]
    positions: Mapping[str, int]  # tokens read before of each source drawn in this phase


class BlendPlan:
    """Maps sample numbers to tokens. Immutable; equal arguments give equal samples on every machine and rank."""

    def __init__(
        self,
        phases: Sequence[Phase],
        source_tokens: Mapping[str, int],
        seed: int,
        contents: Mapping[str, str | None] | None = None,
        fim_form: Sequence[float | str] = (),
    ) -> None:
        """Place the phases one after the other.

        Args:
            source_tokens: tokens in each source by name; its order numbers the sources.
            contents: a hash of each source's tokens, where it is known: part of `past_hash`.
            fim_form: what rearranged documents look like, besides the rates: part of `past_hash` where there are any.

        Raises:
            ConfigError: the phases do not start at 0 and rise, a weight or source name is impossible, or a source is
                shorter than one window.
        """
        check_phases(phases, source_tokens)
        self.source_names = tuple(source_tokens)
        self._numbers = {name: number for number, name in enumerate(source_tokens)}
        self._tokens = dict(source_tokens)
        self._seed = seed
        self._contents = {name: content for name, content in (contents or {}).items() if content is not None}
        self._fim_form = list(fim_form)
        self._phases = _place(phases)
        self._orders = {name: self._order_of(name) for name in source_tokens}
        self._first_samples = [phase.first_sample for phase in self._phases]
        self._first_tokens = [phase.first_token for phase in self._phases]

    def locate(self, sample: int) -> SampleLocation:
        """Return where sample number `sample` (from 0) of the run lies."""
        phase = self._phases[bisect_right(self._first_samples, sample) - 1]
        name, drawn = phase.interleave.draw(sample - phase.first_sample)
        position = phase.positions[name] + drawn * phase.seq_length
        epoch, spans = self._orders[name].read(position, phase.seq_length)
        return SampleLocation(phase.number, self._numbers[name], epoch, spans, phase.fim_rates.get(name, 0.0))

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
        """Return the SHA-256 of `past`: plans with equal hashes gave equal samples so far, whatever they hold for the
        future."""
        canonical = json.dumps(self.past(consumed_tokens), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def past(self, consumed_tokens: int) -> dict[str, Any]:
        """Return everything that determined the samples before `consumed_tokens`, as JSON has it.

        Of a source, the number of its tokens is part of it and, where it is known, the hash of them.
        """
        past: list[dict[str, Any]] = []
        drawn: dict[str, list[int | str | None]] = {}
        for phase, end in self._phases_until(self.sample_at(consumed_tokens)):
            weights = phase.interleave.weights
            past.append({"samples": end - phase.first_sample, "seq_length": phase.seq_length, "weights": weights})
            if phase.fim_rates:
                past[-1] |= {"fim_rates": dict(phase.fim_rates), "fim_form": self._fim_form}
            drawn.update((name, [self._tokens[name], self._contents.get(name)]) for name in weights)
        return {"format": FORMAT, "seed": self._seed, "phases": past, "sources": drawn}

    def epochs(self, total_tokens: int) -> dict[str, tuple[float, ...]]:
        """Return how often each source is read in each phase of a run of `total_tokens`."""
        epochs = {name: [0.0] * (self._phases[-1].number + 1) for name in self.source_names}
        last = self._phases[bisect_right(self._first_tokens, total_tokens) - 1]
        samples = last.first_sample + -(-(total_tokens - last.first_token) // last.seq_length)
        for phase, end in self._phases_until(samples):
            for name, windows in phase.interleave.counts_before(end - phase.first_sample).items():
                epochs[name][phase.number] = windows * phase.seq_length / self._tokens[name]
        return {name: tuple(values) for name, values in epochs.items()}

    def tokens_read(self, sample: int) -> dict[str, int]:
        """Return how many tokens of each source the samples 0 ... sample-1 took."""
        read = dict.fromkeys(self.source_names, 0)
        for phase, end in self._phases_until(sample):
            for name, drawn in phase.interleave.counts_before(end - phase.first_sample).items():
                read[name] = phase.positions[name] + drawn * phase.seq_length
        return read

    def _order_of(self, name: str) -> SourceOrder:
        lengths = [
            SampleLength(phase.positions[name], phase.seq_length) for phase in self._phases if name in phase.positions
        ]
        return SourceOrder(name, self._tokens[name], self._seed, self._phases[0].seq_length, lengths)

    def _phases_until(self, sample: int) -> list[tuple[_PlacedPhase, int]]:
        """Return the phases that have samples before `sample`, each with the end of those samples."""
        ends = [*self._first_samples[1:], sample]
        pairs = zip(self._phases, ends, strict=True)
        return [(phase, min(end, sample)) for phase, end in pairs if phase.first_sample < sample]


def _place(phases: Sequence[Phase]) -> list[_PlacedPhase]:
    """Work out where each phase begins: in samples, in tokens, and in each source."""
    placed: list[_PlacedPhase] = []
    positions: dict[str, int] = {}
    sample, token = 0, 0
    for number, phase in enumerate(phases):
        weights = {name: weight for name, weight in phase.weights.items() if weight > 0}
        interleave = Interleave(weights)
        samples = None  # the last phase has no end
        if number + 1 < len(phases):
            samples = max(0, -(-(phases[number + 1].start_tokens - token) // phase.seq_length))
            if samples == 0:  # shorter than the sample that was under way: never gets its turn, and leaves no trace
                continue
        rates = {name: rate for name, rate in phase.fim_rates.items() if rate > 0 and name in weights}
        begun = {name: positions.get(name, 0) for name in weights}
        placed.append(_PlacedPhase(number, sample, token, phase.seq_length, interleave, rates, begun))
        if samples is not None:
            for name, drawn in interleave.counts_before(samples).items():
                positions[name] = begun[name] + drawn * phase.seq_length
            sample, token = sample + samples, token + samples * phase.seq_length
    return placed


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
