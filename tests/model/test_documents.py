"""Is every document of a sample on its own, when it is asked to be? Oracle: the definition of the model, run on one
document after the other."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from nemotron_train.config.schema import Recompute, RunConfig
from nemotron_train.data.batch import Batch, build_batch
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.ops.documents import Documents
from nemotron_train.step import run_all
from tests.engine.live import (
    Arrays,
    gradients_of,
    live_run,
    micro_batches,
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


def gradients_through_the_schedule(config: RunConfig) -> tuple[Arrays, Arrays]:
    with live_run(config) as run:
        run_all(run, micro_batches(samples(config), 2), forward_only=False)
        return weights_of(run), gradients_of(run)


def documents(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tokens and labels of every document; the label of the last token is another document's first."""
    for tokens, labels, mask in zip(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, strict=True):
        start = 0
        for end in [*(tokens == EOD).nonzero().flatten().tolist(), SEQ - 1]:
            if start <= end:
                own = labels[start : end + 1].clone()
                own[mask[start : end + 1] == 0] = -100  # not counted
                yield tokens[start : end + 1], own
            start = end + 1


def loss_document_by_document(reference: HybridModel, batch: Batch) -> torch.Tensor:
    nats = [
        functional.cross_entropy(reference(tokens[None])[0], labels, reduction="sum", ignore_index=-100)
        for tokens, labels in documents(batch)
    ]
    return torch.stack(nats).sum() / batch.loss_mask_BS.sum()


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "recompute all": (1, {}, {"train": {"recompute": Recompute.full}}),
    "recompute the inside": (1, {}, {"train": {"recompute": Recompute.selective}}),
    "tp2_sp": (2, dict(tensor_parallel_size=2, sequence_parallel=True), {}),
    "pp2": (2, dict(pipeline_parallel_size=2), {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_documents_on_their_own(ranks: RankPool, layout: str) -> None:
    """Fails if attention, convolution or scan look across an end, or a layout or recomputation forgets the ends."""
    world_size, parallel, sections = LAYOUTS[layout]
    config = config_with(parallel, **sections)
    returned = ranks.run(gradients_through_the_schedule, world_size, config)
    tp_size = config.parallel.tensor_parallel_size
    weights = join_ranks([weights for weights, _ in returned], tp_size, config.model)
    gradients = join_ranks([gradients for _, gradients in returned], tp_size, config.model)
    reference = reference_with(weights, config.model)
    loss_document_by_document(reference, samples(config)).backward()
    wrong = {}
    for name, parameter in reference.named_parameters():
        expected = to_array(parameter.grad)
        wrong[name] = float(np.linalg.norm(gradients[name] - expected) / np.linalg.norm(expected))
    assert {name: difference for name, difference in wrong.items() if not difference <= 1e-3} == {}


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


def test_documents_know_their_bounds() -> None:
    """Fails if a sample's first document continues the one before it, or bounds are off by one."""
    found = Documents(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3], [0, 0, 0, 0, 0]], dtype=torch.int32))
    assert found.cu_seqlens.tolist() == [0, 2, 5, 6, 7, 9, 10, 15]
    assert found.spans == [[(0, 2), (2, 5)], [(0, 1), (1, 2), (2, 4), (4, 5)], [(0, 5)]]
    assert found.cu_seqlens.dtype is torch.int32


def test_batches_number_documents_and_mask_what_would_tie_them_together() -> None:
    """Fails if the token that ends a document is counted to the next, or predicts the next document's first token."""
    window = np.array([7, EOD, 8, 9, EOD, EOD, 5])
    batch = build_batch([window], [0], 2, 6, eod_id=EOD)
    assert batch.document_BS is not None
    assert batch.document_BS.tolist()[0] == [0, 0, 1, 1, 1, 2]
    assert batch.loss_mask_BS.tolist() == [[1, 0, 1, 1, 0, 0], [0] * 6]
    assert build_batch([window], [0], 2, 6).document_BS is None
