"""The picture shows the plan: its curve, its batches, its blend."""

import numpy as np
import pytest

from nemotron_train.plan.picture import build_figure
from nemotron_train.plan.run_plan import plan_run
from tests.plan.small import experiment_with


def test_the_picture_shows_rate_batch_and_blend_of_the_run() -> None:
    """Fails if the curve misses a corner, a batch step or a weight of a phase is drawn wrongly, or shares do not add up
    to the whole."""
    schedule = "train.batch_schedule=[{start_tokens: 2_000_000_000_000, global_batch_size: 1472}]"
    plan = plan_run(experiment_with("nemotron_nano_12b_v2", schedule), 4)
    rate, batch, blend = build_figure(plan).axes
    tokens, rates = rate.lines[0].get_data()
    assert rates[list(tokens).index(8_000_000_000)] == 4.5e-4
    assert rates[list(tokens).index(16_400_000_000_000)] == 4.5e-4
    assert rates[-1] == pytest.approx(4.5e-6)
    values, edges, _ = batch.patches[0].get_data()
    assert list(values) == [6_029_312, 12_058_624]
    assert list(edges) == [0, 2e12, 20e12]
    shares = {}
    for patch in blend.patches:
        above, edges, below = patch.get_data()
        shares[patch.get_label()] = above - below
    assert list(edges) == [0, 12e12, 18e12, 20e12]
    np.testing.assert_allclose(sum(shares.values()), 1.0)
    assert shares["code"] == pytest.approx([0.2, 0.2 / 0.999, 0.2 / 0.999], rel=2e-3)
    assert shares["crawl_medium"] == pytest.approx([0.14, 0, 0], abs=1e-6)
