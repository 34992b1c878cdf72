"""Are the weights of a rank those of the step, before a forward pass asks for them?"""

from pathlib import Path

import numpy as np

from nemotron_train.config.schema import RunConfig
from nemotron_train.engine.wrap import weights_complete
from nemotron_train.step import train_step
from tests.engine.live import Arrays, live_run, micro_batches, random_samples, weights_of
from tests.ranks import RankPool
from tests.small_runs import small_config


def weights_after_a_step(config: RunConfig) -> Arrays:
    with live_run(config) as run:
        share = run.share
        samples = micro_batches(random_samples(0, 8, config), share.micro_batch_size, share.dp_rank, share.dp_size)
        train_step(run, samples, consumed_tokens=config.lr.warmup_tokens)
        with weights_complete(run.chunks):
            return weights_of(run)


def test_overlapped_gathers_are_over_where_weights_are_read(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if a checkpoint would hold weights that another rank has updated since: their gather waits for the next
    forward pass."""
    overlapped, plain = (
        ranks.run(weights_after_a_step, 2, small_config(corpus, tmp_path, parallel={"overlap_param_gather": overlap}))
        for overlap in (True, False)
    )
    for found, expected in zip(overlapped, plain, strict=True):
        for name, weight in expected.items():
            assert np.array_equal(found[name], weight), name
