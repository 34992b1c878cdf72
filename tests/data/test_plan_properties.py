"""What must hold for every plan of phases, tried on plans that nobody thought of (hypothesis draws them)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.data.blend import BlendPlan, Phase

FIRST = 4
SOURCES = {"a": 4096, "b": 5003, "c": 9000}

weights = st.fixed_dictionaries({}, optional={name: st.floats(0.01, 10, allow_nan=False) for name in SOURCES}).filter(
    bool
)
phases = st.lists(st.tuples(st.integers(1, 4000), weights, st.sampled_from([1, 2, 4, 8, 64])), min_size=1, max_size=4)
seeds = st.integers(0, 2**63 - 1)
SAMPLES = 1500


def plan_of(drawn: list, seed: int) -> BlendPlan:
    return BlendPlan(phases_of(drawn), SOURCES, seed)


def phases_of(drawn: list) -> list[Phase]:
    """Phases of drawn lengths in tokens, weights and sample lengths; the first has samples of FIRST tokens."""
    start, placed = 0, []
    for number, (tokens, shares, factor) in enumerate(drawn):
        placed.append(Phase(start, FIRST * (factor if number else 1), shares))
        start += tokens
    return placed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(phases, seeds)
def test_samples_and_tokens_are_each_others_inverse(drawn: list, seed: int) -> None:
    """Fails if a resume from consumed_tokens could begin at another sample."""
    plan = plan_of(drawn, seed)
    consumed = 0
    for sample in range(300):
        assert plan.tokens_before(sample) == consumed
        assert plan.sample_at(consumed) == sample
        consumed += sum(span.count for span in plan.locate(sample).spans) - 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(phases, seeds)
def test_no_token_is_used_twice_before_its_source_was_read_once(drawn: list, seed: int) -> None:
    """Fails if any sequence of phases, weights and lengths repeats or skips tokens within an epoch."""
    plan = plan_of(drawn, seed)
    used: dict[str, set[int]] = {name: set() for name in SOURCES}
    over_end: set[str] = set()
    read, over = dict.fromkeys(SOURCES, 0), dict.fromkeys(SOURCES, 0)
    for sample in range(SAMPLES):
        location = plan.locate(sample)
        name = plan.source_names[location.source]
        left = sum(span.count for span in location.spans) - 1
        if name in over_end or read[name] + left > SOURCES[name] - FIRST:
            over_end.add(name)  # its first epoch is over
            continue
        read[name] += left
        for span in location.spans:
            for token in range(span.start, span.start + min(span.count, left)):
                over[name] += token % SOURCES[name] in used[name]
                used[name].add(token % SOURCES[name])
            left -= min(span.count, left)
    # Only the one block over the end of an epoch may bring tokens of the next one early.
    assert all(count < FIRST * 2 for count in over.values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(phases, phases, seeds, st.integers(0, 400))
def test_the_past_does_not_depend_on_the_future(drawn: list, other: list, seed: int, cut: int) -> None:
    """Fails if replacing all that comes after a sample changes a sample before it, or its hash."""
    full = plan_of(drawn, seed)
    end = full.tokens_before(cut)
    before = [phase for phase in phases_of(drawn) if phase.start_tokens < end]
    after = [Phase(end + phase.start_tokens, phase.seq_length, phase.weights) for phase in phases_of(other)]
    changed = BlendPlan([*before, *after], SOURCES, seed)
    assert [changed.locate(sample) for sample in range(cut)] == [full.locate(sample) for sample in range(cut)]
    assert changed.past_hash(end) == full.past_hash(end)
