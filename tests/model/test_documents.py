"""Is every document of a sample on its own, when it is asked to be? The oracle is the definition of the model,
which runs on one document after the other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.schema import Recompute, RunConfig
from nemotron_train.data.batch import Batch, build_batch
from nemotron_train.step import run_all
from tests.engine.live import (
    Arrays,
    gradients_of,
    live_run,
    micro_batches,
    reference_loss,
    reference_with,
    to_array,
    weights_of,
)
from tests.model.whole import join_ranks
from tests.ranks import RankPool
from tests.small_runs import VOCAB, small_config

EOD = VOCAB - 1
SEQ = 32
# Where documents end in each sample: at chunk edges (chunks are of 16), after one token, at both ends, and nowhere.
ENDS = ([3, 15, 16, 31], [0, 1, 20], [], [15])


def samples(config: RunConfig) -> Batch:
    rng = np.random.default_rng(5)
    windows = [rng.integers(0, EOD, SEQ + 1) for _ in ENDS]
    for window, ends in zip(windows, ENDS, strict=True):
        window[ends] = EOD
    return build_batch(windows, [0, 1, 0, 1], len(ENDS), SEQ, eod_id=EOD)


def config_with(parallel: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    model = {"layer_pattern": "M*-M", "num_query_groups": 4, "init_std": 0.2}
    return small_config(Path("unused"), Path("unused"), model=model, parallel=parallel, **sections)


def trained_through_the_schedule(config: RunConfig) -> tuple[Arrays, Arrays, float]:
    """This rank's weights, gradients, and nats of one global batch in micro-batches of 2 (0 but on the last stage)."""
    with live_run(config) as run:
        reports = run_all(run, micro_batches(samples(config), 2), forward_only=False)
        return weights_of(run), gradients_of(run), sum(float(report.nats_K.sum()) for report in reports)


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "recompute all": (1, {}, {"train": {"recompute": Recompute.full}}),
    "recompute the inside": (1, {}, {"train": {"recompute": Recompute.selective}}),
    "tp2_sp": (2, dict(tensor_parallel_size=2, sequence_parallel=True), {}),
    "pp2": (2, dict(pipeline_parallel_size=2), {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_documents_on_their_own(ranks: RankPool, layout: str) -> None:
    """Fails if attention, convolution or scan look across an end, or a layout or recomputation forgets the ends."""
    world_size, parallel, sections = LAYOUTS[layout]
    config = config_with(parallel, **sections)
    returned = ranks.run(trained_through_the_schedule, world_size, config)
    tp_size = config.parallel.tensor_parallel_size
    weights = join_ranks([weights for weights, _, _ in returned], tp_size, config.model)
    gradients = join_ranks([gradients for _, gradients, _ in returned], tp_size, config.model)
    reference, batch = reference_with(weights, config.model), samples(config)
    loss = reference_loss(reference, batch)
    loss.backward()
    assert returned[-1][2] == pytest.approx(float(loss.detach() * batch.loss_mask_BS.sum()), rel=1e-5)
    wrong = {}
    for name, parameter in reference.named_parameters():
        expected = to_array(parameter.grad)
        wrong[name] = float(np.linalg.norm(gradients[name] - expected) / np.linalg.norm(expected))
    assert {name: difference for name, difference in wrong.items() if not difference <= 1e-3} == {}


def gradients_of_whole_samples(told_apart: bool) -> Arrays:
    config = config_with({}, train={"micro_batch_size": 1})
    batch = samples(config)
    whole = replace(batch, document_BS=torch.zeros_like(batch.document_BS) if told_apart else None)
    with live_run(config) as run:
        run_all(run, micro_batches(whole, 1), forward_only=False)
        return gradients_of(run)


def test_a_sample_of_one_document_has_the_bits_of_a_sample_without_boundaries(ranks: RankPool) -> None:
    """Fails if telling documents apart costs more than it must, or does anything where there is nothing to tell."""
    apart, together = (ranks.run(gradients_of_whole_samples, 1, told_apart)[0] for told_apart in (True, False))
    for name, expected in together.items():
        np.testing.assert_array_equal(apart[name], expected, err_msg=name)


def embedding_gradients_of_one_document(told_apart: bool, pattern: str) -> Arrays:
    """The gradient of the second document's loss; every token stands once, so rows of the embedding are places."""
    config = small_config(Path("unused"), Path("unused"), model={"layer_pattern": pattern, "vocab_size": 96})
    tokens = torch.arange(SEQ)[None]
    number_BS = torch.tensor([[0] * 11 + [1] * 9 + [2] * 12], dtype=torch.int32)
    batch = Batch(
        tokens_BS=tokens,
        labels_BS=tokens + 1,
        loss_mask_BS=(number_BS == 1).float(),
        source_B=torch.zeros(1, dtype=torch.int64),
        document_BS=number_BS if told_apart else None,
    )
    with live_run(replace(config, train=replace(config.train, micro_batch_size=1))) as run:
        run_all(run, [batch], forward_only=False)
        return gradients_of(run)


@pytest.mark.parametrize("pattern", ["M", "*", "M-*-M"])
def test_no_gradient_reaches_another_document(ranks: RankPool, pattern: str) -> None:
    """Fails if a loss depends, however little, on a token of another document."""
    name = "embedding.word_embeddings.weight"
    apart, together = (
        ranks.run(embedding_gradients_of_one_document, 1, told_apart, pattern)[0][name] for told_apart in (True, False)
    )
    assert np.abs(apart[11:20]).sum(1).min() > 0
    assert np.abs(apart[:11]).max() == 0.0
    assert np.abs(apart[20:]).max() == 0.0
    assert np.abs(together[:11]).max() > 0
