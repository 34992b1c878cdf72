"""Steps are arithmetic: checked against a loop that takes them one by one, and against the published runs."""

import random

import pytest

from nemotron_train.plan.batching import BatchPlan, BatchSegment
from tests.plan.small import plan_of


def walk(plan: BatchPlan, consumed: int = 0) -> list[tuple[int, int]]:
    """Take the steps one by one: (tokens consumed before, samples) of each."""
    steps = []
    while True:
        segment = [s for s in plan.segments if s.start_tokens <= consumed][-1]
        tokens = segment.global_batch_size * segment.seq_length
        if consumed + tokens > plan.train_tokens:
            return steps
        steps.append((consumed, tokens))
        consumed += tokens


def random_plan(seed: int) -> BatchPlan:
    dice = random.Random(seed)
    starts = sorted(dice.sample(range(1, 900), dice.randint(0, 3)))
    segments = [BatchSegment(start, dice.randint(1, 9), dice.randint(1, 7)) for start in (0, *starts)]
    return BatchPlan(dice.randint(70, 1000), 1, 1, tuple(segments))


@pytest.mark.parametrize("seed", range(60))
def test_closed_forms_equal_taking_the_steps(seed: int) -> None:
    """Fails if a segment's last step is lost or taken twice, or a step is cut short at the end."""
    plan = random_plan(seed)
    steps = walk(plan)
    assert plan.num_steps == len(steps)
    by_length: dict[int, int] = {}
    for step, (consumed, tokens) in enumerate(steps):
        assert plan.consumed_tokens_at(step) == consumed
        assert plan.step_at(consumed) == step
        assert plan.steps_left(consumed) == len(steps) - step
        assert plan.tokens_per_step_at(consumed) == tokens
        assert plan.step_at_or_after(consumed) == consumed
        if step:
            assert plan.step_at_or_after(steps[step - 1][0] + 1) == consumed
        length = plan.seq_length_at(consumed)
        by_length[length] = by_length.get(length, 0) + tokens
    assert plan.consumed_at_end == sum(tokens for _, tokens in steps)
    assert {length: tokens for length, tokens in plan.tokens_by_length().items() if tokens} == by_length
    assert plan.steps_left(plan.consumed_at_end) == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_run_between_steps_goes_on_to_the_last_step(seed: int) -> None:
    """Fails if a run resumed with another batch size miscounts what is left, or does not end with step num_steps."""
    plan = random_plan(seed)
    for consumed in range(0, plan.train_tokens + 20):
        left = walk(plan, consumed)
        assert plan.steps_left(consumed) == len(left)
        assert plan.step_at(consumed) == plan.num_steps - len(left)


@pytest.mark.parametrize(
    ("tokens", "batch", "steps"),
    [(20_000_000_000_000, 736, 3_317_128), (15_000_000_000_000, 768, 2_384_185), (20_000_000_000_000, 768, 3_178_914)],
)
def test_published_runs_have_their_steps(tokens: int, batch: int, steps: int) -> None:
    """Fails if steps are rounded up, or lengths are read in another unit."""
    train = [f"train.train_tokens={tokens}", f"train.global_batch_size={batch}", "train.eval_tokens=8192"]
    plan = plan_of("train=pretrain_8k", *train, world_size=8)
    assert plan.num_steps == steps
    assert plan.batches.num_micro_batches_at(0) == batch // 8


def test_micro_batches_follow_batch_ranks_and_micro_batch() -> None:
    """Fails if data-parallel ranks, micro-batch size or the schedule do not change the number of micro-batches."""
    schedule = "train.batch_schedule=[{start_tokens: 10000, global_batch_size: 64}]"
    plan = plan_of(schedule, "train.micro_batch_size=2", "parallel=tensor_2", world_size=4)
    assert plan.batches.num_micro_batches_at(0) == 16 // (2 * 2)
    assert plan.batches.num_micro_batches_at(9999) == 4
    assert plan.batches.num_micro_batches_at(10000) == 64 // (2 * 2)
