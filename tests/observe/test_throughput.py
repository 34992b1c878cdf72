"""Speeds follow from a clock that the test turns."""

import pytest

from nemotron_train.observe.throughput import StepTimer


def test_speed_of_a_step_is_per_rank_and_counts_only_the_step() -> None:
    """Fails if ranks, FLOPs or time outside of start and finish enter wrongly."""
    now = [100.0]
    timer = StepTimer(num_ranks=4, train_tokens=80_000, clock=lambda: now[0])
    timer.start()
    now[0] += 2.0
    speed = timer.finish(step_tokens=16_000, consumed_tokens=16_000, flops_per_token=5e9)
    assert speed.step_seconds == 2.0
    assert speed.tokens_per_second_per_gpu == 16_000 / 2 / 4
    assert speed.model_tflops_per_gpu == pytest.approx(16_000 / 2 / 4 * 5e9 / 1e12)
    assert speed.seconds_left == pytest.approx(64_000 / 8_000)


def test_the_first_step_and_pauses_between_steps_do_not_enter_the_time_left() -> None:
    """Fails if compilation in the first step, or an evaluation between steps, makes the run look slow."""
    now = [0.0]
    timer = StepTimer(num_ranks=2, train_tokens=100_000, clock=lambda: now[0])
    for number, seconds in enumerate((50.0, 1.0, 3.0)):
        timer.start()
        now[0] += seconds
        speed = timer.finish(step_tokens=1000, consumed_tokens=1000 * (number + 1), flops_per_token=1e12)
        now[0] += 999.0
    assert speed.seconds_left == pytest.approx((100_000 - 3000) * 4.0 / 2000)


def test_the_time_left_follows_a_larger_batch() -> None:
    """Fails if the time left counts steps: with a growing batch that is far too long."""
    now = [0.0]
    timer = StepTimer(num_ranks=1, train_tokens=10_000_000, clock=lambda: now[0], warmup_steps=0)
    consumed = 0
    for step_tokens, seconds in [(1000, 1.0)] * 100 + [(4000, 2.0)] * 50:
        timer.start()
        now[0] += seconds
        consumed += step_tokens
        speed = timer.finish(step_tokens=step_tokens, consumed_tokens=consumed, flops_per_token=1.0)
    assert speed.seconds_left == pytest.approx((10_000_000 - consumed) / 2000)
