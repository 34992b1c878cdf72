"""Oracles: counting every token a plan uses; plans that differ only in their future or in what must not matter."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from nemotron_train.data.blend import BlendPlan, Phase, SampleLocation
from nemotron_train.errors import ConfigError

S = 16
SOURCES = {"web": 1003, "code": 640, "math": 211}  # 640 is a whole number of windows, the others are not
PHASES = [
    Phase(0, S, {"web": 0.6, "code": 0.3, "math": 0.1}),
    Phase(3000, S, {"web": 0.2, "code": 0.5, "math": 0.3}),  # 3000 is within a sample
    Phase(9600, S, {"code": 1.0, "math": 0.0}),
    Phase(12000, S, {"web": 1.0, "math": 1.0}),
]


def stream_positions(plan: BlendPlan, name: str, samples: int) -> list[tuple[SampleLocation, list[int]]]:
    """Return where each of a source's samples lies, and the positions of its S + 1 tokens in the stream."""
    number = plan.source_names.index(name)
    found = []
    for location in map(plan.locate, range(samples)):
        if location.source == number:
            tokens = [(span.start + i) % SOURCES[name] for span in location.spans for i in range(span.count)]
            found.append((location, tokens))
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_every_token_is_used_exactly_once_an_epoch_across_phases(name: str) -> None:
    """Fails if a window is drawn twice or skipped within an epoch, at a phase boundary or at the end of an epoch."""
    plan = BlendPlan(PHASES, SOURCES, seed=3)
    size = SOURCES[name]
    used: Counter[int] = Counter()
    windows = stream_positions(plan, name, 2000)
    for number, (_, tokens) in enumerate(windows, start=1):
        used.update(tokens[:-1])
        epochs_done, begun = number * S // size, -(-number * S // size)
        # The one window over the end of an epoch may be drawn before the epoch's last one: once more for < S tokens.
        assert max(used.values()) <= begun + 1
        if number * S - epochs_done * size < S:  # all windows that begin in these epochs are drawn
            over = number * S - epochs_done * size
            assert sum(used[token] == epochs_done for token in range(size)) == size - over
            assert sum(used[token] == epochs_done + 1 for token in range(size)) == over
    assert windows[-1][0].epoch >= 3


def test_every_window_is_drawn_exactly_once_an_epoch() -> None:
    """Fails if two samples of an epoch start at the same token."""
    plan = BlendPlan(PHASES, SOURCES, seed=3)
    for name, size in SOURCES.items():
        by_epoch: dict[int, list[int]] = {}
        for location, _ in stream_positions(plan, name, 2000):
            by_epoch.setdefault(location.epoch, []).append(location.start_token)
        for epoch, starts in by_epoch.items():
            assert len(set(starts)) == len(starts)
            if epoch < max(by_epoch):
                assert len(starts) in (size // S, size // S + 1)


def test_the_last_token_of_a_sample_is_the_first_of_the_window_after_it() -> None:
    """Fails if the label of a window's last token is not the token that follows in the stream."""
    plan = BlendPlan(PHASES, SOURCES, seed=3)
    crossing = 0
    for name, size in SOURCES.items():
        for location, tokens in stream_positions(plan, name, 2000):
            assert len(tokens) == S + 1
            steps = [(after - before) % size for before, after in pairwise(tokens)]
            jumps = [number for number, step in enumerate(steps, start=1) if step != 1]
            assert jumps in ([], [location.spans[0].count])  # only where one epoch ends and the next starts
            crossing += len(location.spans) == 2
    assert crossing >= 10


def test_packing_differs_from_epoch_to_epoch() -> None:
    """Fails if windows are cut at the same tokens in every epoch, as 640 tokens in windows of 16 would be."""
    plan = BlendPlan([Phase(0, S, {"code": 1.0})], SOURCES, seed=3)
    cuts = {plan.locate(sample).start_token % S for sample in range(0, 40 * 12, 40)}
    assert len(cuts) > 4


def test_future_phases_do_not_change_the_past() -> None:
    """Fails if a sample depends on a later phase, the length of its own phase, or a source that is not drawn yet."""
    full = BlendPlan(PHASES, SOURCES, seed=3)
    locations = [full.locate(sample) for sample in range(2000)]
    for known in range(1, len(PHASES)):
        end = full.sample_at(full._first_tokens[known])
        for future in ([], [Phase(PHASES[known].start_tokens, S, {"new": 1.0})], [Phase(10**6, 2 * S, {"web": 1.0})]):
            other = BlendPlan([*PHASES[:known], *future], {**SOURCES, "new": 5000}, seed=3)
            assert [other.locate(sample) for sample in range(end)] == locations[:end]
            assert other.past_hash(end * S) == full.past_hash(end * S)


def test_a_phase_cut_short_keeps_what_it_gave() -> None:
    """Fails if "switch the mixture now" at any sample changes samples before it, or is taken for another past."""
    full = BlendPlan(PHASES, SOURCES, seed=3)
    for cut in (1, 77, 188, 189, 431):
        before = [phase for phase in PHASES if phase.start_tokens < cut * S]
        other = BlendPlan([*before, Phase(cut * S, S, {"math": 1.0})], SOURCES, seed=3)
        assert [other.locate(sample) for sample in range(cut)] == [full.locate(sample) for sample in range(cut)]
        assert other.past_hash(cut * S) == full.past_hash(cut * S)
        assert other.locate(cut).source == 2
        assert other.past_hash((cut + 1) * S) != full.past_hash((cut + 1) * S)


@pytest.mark.parametrize(
    "change",
    [
        lambda: BlendPlan(PHASES, SOURCES, seed=4),
        lambda: BlendPlan(PHASES, {**SOURCES, "web": 1004}, seed=3),
        lambda: BlendPlan([Phase(0, S, {"web": 0.6, "code": 0.3, "math": 0.11}), *PHASES[1:]], SOURCES, seed=3),
        lambda: BlendPlan([PHASES[0], Phase(2000, S, PHASES[1].weights), *PHASES[2:]], SOURCES, seed=3),
        lambda: BlendPlan([Phase(p.start_tokens, 2 * S, p.weights) for p in PHASES], SOURCES, seed=3),
    ],
    ids=["seed", "source size", "weight", "phase start", "seq_length"],
)
def test_past_hash_tells_another_past(change: object) -> None:
    """Fails if a run could be resumed with a plan that would have given it other samples."""
    assert callable(change)
    assert change().past_hash(3200) != BlendPlan(PHASES, SOURCES, seed=3).past_hash(3200)


def test_past_hash_ignores_order_and_scale_of_what_is_asked() -> None:
    """Fails if sorting the sources of a recipe differently, or doubling all weights, is taken for another past."""
    sources = dict(reversed(SOURCES.items()))
    phases = [Phase(p.start_tokens, S, {n: 2 * w for n, w in reversed(list(p.weights.items()))}) for p in PHASES]
    first, second = BlendPlan(PHASES, SOURCES, seed=3), BlendPlan(phases, sources, seed=3)
    assert first.past_hash(20_000) == second.past_hash(20_000)
    for sample in range(900):
        one, other = first.locate(sample), second.locate(sample)
        assert first.source_names[one.source] == second.source_names[other.source]
        assert (one.phase, one.epoch, one.spans) == (other.phase, other.epoch, other.spans)


def test_the_past_hash_of_a_known_plan_stays_what_it_is() -> None:
    """Fails if the arithmetic or the hashed form changed without FORMAT being raised: old runs could not tell."""
    plan = BlendPlan(PHASES, SOURCES, seed=3)
    starts = [plan.locate(sample).start_token for sample in (0, 1, 2, 500, 1999)]
    assert starts == [832, 277, 720, 623, 858]
    assert plan.past_hash(16_000).startswith("bd60b673d72413dc")


def test_phases_begin_at_the_first_sample_at_or_after_their_start() -> None:
    """Fails if a phase starts within a sample, or a sample early or late."""
    plan = BlendPlan(PHASES, SOURCES, seed=3)
    phases = [plan.locate(sample).phase for sample in range(1000)]
    assert [phases.index(number) for number in range(4)] == [0, 188, 600, 750]  # 188 = ceil(3000 / 16)
    for sample in (0, 1, 187, 188, 600, 999):
        assert plan.tokens_before(sample) == sample * S
        assert plan.sample_at(sample * S) == sample
    with pytest.raises(ConfigError, match="3001 consumed tokens are no whole number of samples of 16"):
        plan.sample_at(3001)


def test_another_seq_length_reads_on_in_the_same_epoch() -> None:
    """Fails if tokens of an epoch are left out or read again when the length of samples changes, or tokens and samples
    are no longer each other's inverse."""
    plan = BlendPlan([Phase(0, S, {"web": 1.0}), Phase(320, 4 * S, {"web": 1.0, "code": 1.0})], SOURCES, seed=3)
    web = stream_positions(plan, "web", 60)
    assert [len(tokens) for _, tokens in web[:21]] == [S + 1] * 20 + [4 * S + 1]
    used: Counter[int] = Counter()
    for location, tokens in web:
        used.update(tokens[:-1])
        if used.total() <= 1003 - S:
            assert location.epoch == 0
            assert sum(used.values()) - len(used) < S  # the one window over the end of the epoch
    assert used.total() > 1003
    for sample in range(60):
        assert plan.sample_at(plan.tokens_before(sample)) == sample
    assert plan.tokens_before(22) == 320 + 2 * 4 * S


def test_tokens_read_are_the_tokens_of_the_samples() -> None:
    """Fails if the count of what a run has read is off in any phase, for sources that pause in one, too."""
    plan = BlendPlan(PHASES, SOURCES, seed=3)
    read = dict.fromkeys(SOURCES, 0)
    for sample in range(1000):
        assert plan.tokens_read(sample) == read
        read[plan.source_names[plan.locate(sample).source]] += S


def test_a_phase_shorter_than_a_sample_leaves_no_trace() -> None:
    """Fails if a phase that never gets a sample changes epochs, order or hash of the others."""
    short = [PHASES[0], Phase(2993, 8 * S, {"web": 1.0}), Phase(2999, S, PHASES[1].weights)]
    plain = [PHASES[0], Phase(2999, S, PHASES[1].weights)]
    with_short, without = BlendPlan(short, SOURCES, seed=3), BlendPlan(plain, SOURCES, seed=3)
    for sample in range(400):
        assert with_short.locate(sample).spans == without.locate(sample).spans
    assert with_short.past_hash(6400) == without.past_hash(6400)


def test_epochs_are_the_tokens_drawn_over_the_tokens_there_are() -> None:
    """Fails if the check of max_epochs works on other numbers than the samples that will be drawn."""
    plan = BlendPlan(PHASES, SOURCES, seed=3)
    drawn = np.zeros((len(SOURCES), len(PHASES)))
    for sample in range(900):
        location = plan.locate(sample)
        drawn[location.source, location.phase] += S
    for total in (900 * S, 900 * S - 5):
        for number, (name, epochs) in enumerate(plan.epochs(total).items()):
            assert epochs == pytest.approx((drawn[number] / SOURCES[name]).tolist())


def test_every_rank_of_a_step_reads_the_mixture_of_the_phase() -> None:
    """Fails if a contiguous block of samples is off the weights by 3.36 samples, or a source of weight 0 is drawn."""
    weights = {"web": 0.7, "code": 0.26, "math": 0.04, "none": 0.0, "new": 0}
    plan = BlendPlan([Phase(0, S, weights)], {**SOURCES, "none": 999, "new": 10**6}, seed=3)
    drawn = [plan.locate(sample).source for sample in range(6000)]
    for block in (1, 7, 24, 96, 768):
        for first in range(0, len(drawn) - block, block):
            counts = Counter(drawn[first : first + block])
            for number, weight in enumerate(weights.values()):
                assert abs(counts[number] - weight * block) < (3.36 if weight else 1e-9)


def test_a_plan_of_twenty_trillion_tokens_is_found_at_once_and_stays_exact() -> None:
    """Fails if large numbers lose precision: two of the last samples would be the same window."""
    sources = {f"s{number:02d}": 10**11 + number * 7_777_777_777 for number in range(60)}
    weights = {name: float(1 + number % 7) for number, name in enumerate(sources)}
    plan = BlendPlan([Phase(0, 8192, weights), Phase(15 * 10**12, 8192, dict.fromkeys(sources, 1.0))], sources, seed=1)
    last = 20 * 10**12 // 8192
    starts = [plan.locate(sample) for sample in range(last - 300, last)]
    assert len({(location.source, location.epoch, location.start_token) for location in starts}) == 300
    assert all(0 <= location.start_token < sources[plan.source_names[location.source]] for location in starts)
    assert sum(sum(e) * sources[n] for n, e in plan.epochs(20 * 10**12).items()) == pytest.approx(20 * 10**12, rel=1e-9)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "the first must be there and start at 0"),
        ([Phase(5, S, {"web": 1.0})], r"start at \[5\] tokens"),
        ([Phase(0, S, {"web": 1.0}), Phase(0, S, {"web": 1.0})], r"phases\[1\].start_tokens=0 does not come after"),
        ([Phase(0, S, {"wbe": 1.0})], r"phases\[0\].weights names source 'wbe'; data.sources has web, code, math"),
        ([Phase(0, S, {"web": -1.0, "code": 2.0})], "gives source 'web' the weight -1.0"),
        ([Phase(0, S, {"web": float("nan")})], "gives source 'web' the weight nan"),
        ([Phase(0, S, {"web": 0.0})], "no source with a weight above 0"),
        ([Phase(0, 211, {"math": 1.0})], "Source 'math' has 211 tokens; .* needs at least 212"),
    ],
)
def test_impossible_phases_are_refused(phases: list[Phase], message: str) -> None:
    """Fails if the mistake is found later, or the message does not name the key."""
    with pytest.raises(ConfigError, match=message):
        BlendPlan(phases, SOURCES, seed=0)
