"""The pipeline's schedule, against Megatron-Core's own tables."""

import random

import pytest

from nemotron_train.plan.pipeline_schedule import most_in_flight, order_of, run_step, step_seconds
from tests.plan import simulated_pipeline

SIZES = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 3), (2, 4), (8, 2)]


@pytest.mark.parametrize(("pp_size", "vpp_size"), SIZES[1:])
def test_passes_run_in_megatron_cores_order(pp_size: int, vpp_size: int) -> None:
    """Fails if a rank's warm-up is miscounted, or micro-batches go through virtual stages in other rounds."""
    odd = (1, pp_size - 1, pp_size + 1) if vpp_size == 1 else ()
    for micro_batches in (pp_size, 2 * pp_size, 5 * pp_size, *odd):
        for rank in range(pp_size):
            theirs = simulated_pipeline.order_of(rank, pp_size, vpp_size, micro_batches)
            ours = [
                ("B" if backward else "F", *rest)
                for backward, *rest in order_of(rank, pp_size, vpp_size, micro_batches)
            ]
            assert ours == theirs


@pytest.mark.parametrize(("pp_size", "vpp_size"), SIZES[1:])
def test_a_step_takes_what_its_passes_and_waiting_do(pp_size: int, vpp_size: int) -> None:
    """Fails if a pass starts before what it needs, or later, if many rounds are not like the last one that was run, or
    if a limit stops a step that would be shorter."""
    dice = random.Random(pp_size * vpp_size)
    for micro_batches in (2 * pp_size, 11 * pp_size, *([9 * pp_size + 1] if vpp_size == 1 else [])):
        chunks = [dice.uniform(0.5, 1.5) for _ in range(pp_size * vpp_size)]
        expected = simulated_pipeline.seconds(chunks, pp_size, micro_batches)
        assert run_step(chunks, pp_size, micro_batches) == pytest.approx(expected)
        assert step_seconds(chunks, pp_size, micro_batches) == pytest.approx(expected, rel=0.01)
        assert run_step(chunks, pp_size, micro_batches, limit=0.99 * expected) == 0.99 * expected
        assert run_step(chunks, pp_size, micro_batches, limit=1.001 * expected) == pytest.approx(expected)


def test_the_bubble_of_equal_chunks_is_the_published_one() -> None:
    """Fails if virtual stages do not divide it: (p - 1) / v of a micro-batch's time, arXiv 2104.04473 section 2.2."""
    for pp_size, vpp_size in SIZES:
        chunks = [1.0 / vpp_size] * (pp_size * vpp_size)
        assert step_seconds(chunks, pp_size, 40 * pp_size) == pytest.approx(40 * pp_size + (pp_size - 1) / vpp_size)


@pytest.mark.parametrize(("pp_size", "vpp_size"), SIZES[1:])
@pytest.mark.parametrize("rounds", [1, 2, 10])
def test_in_flight_is_what_megatrons_schedule_holds(pp_size: int, vpp_size: int, rounds: int) -> None:
    """Fails if a rank's warm-up is miscounted, or chunks of different size are taken for one another."""
    micro_batches = rounds * pp_size
    for rank in range(pp_size):
        kept = [3 + stage * stage + rank for stage in range(vpp_size)]
        held, most = 0, 0
        for kind, _, stage in simulated_pipeline.order_of(rank, pp_size, vpp_size, micro_batches):
            held += kept[stage] if kind == "F" else -kept[stage]
            most = max(most, held)
        assert held == 0
        assert most_in_flight(kept, pp_size, rank, micro_batches) == most
