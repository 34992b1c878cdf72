"""Does a model whose samples are split over context-parallel ranks compute what its plain-torch definition computes of
whole ones? Nats of every token, and the gradient of every parameter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.utils import get_batch_on_this_cp_rank

from nemotron_train.config.schema import PositionEmbedding, QkvNorm, Recompute, RunConfig
from nemotron_train.data.batch import Batch, build_batch, take_part
from nemotron_train.data.sequence_part import SequencePart
from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.engine.mcore_config import build_transformer_config
from nemotron_train.model.build import build_model_chunks
from nemotron_train.ops.implementations import operations
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.ranks import launched_rank
from tests.engine.live import Arrays, live_groups, reference_nats, reference_with, to_array
from tests.model.whole import join_ranks
from tests.ranks import RankPool
from tests.small_runs import VOCAB, small_config

EOD, SEQ = VOCAB - 1, 32
# Where documents end: within runs and at their edges (runs are of 4 or 8 tokens), nowhere, and after single tokens.
ENDS = ([3, 9, 15, 20], [], [0, 1, 31])


@dataclass(frozen=True)
class Case:
    world_size: int
    parallel: dict[str, Any]
    groups: int  # of Mamba heads; there are 8 heads
    documents: bool = False
    recompute: Recompute = Recompute.none
    model: dict[str, Any] = field(default_factory=dict)


CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
ROTATED = dict(position_embedding=PositionEmbedding.rope)
NORMED_AND_ROTATED = dict(**ROTATED, qkv_norm=QkvNorm.qk, attention_logit_scale=2.0)
LEARNED = dict(position_embedding=PositionEmbedding.learned, max_position_embeddings=SEQ)
CASES = {
    "two groups a rank": Case(2, CP2, groups=4),
    "two ranks a group": Case(4, CP4, groups=2),
    "four ranks a group": Case(4, CP4, groups=1),
    "a group a tensor-parallel rank": Case(4, {**CP2, "tensor_parallel_size": 2}, groups=2),
    "documents": Case(4, CP4, groups=2, documents=True),
    "recompute all": Case(2, CP2, groups=4, recompute=Recompute.full),
    "recompute the inside": Case(2, CP2, groups=4, recompute=Recompute.selective),
    "learned positions": Case(2, CP2, groups=4, model=LEARNED),
    "learned positions of documents": Case(4, CP4, groups=2, documents=True, model=LEARNED),
    "norms and rope": Case(2, CP2, groups=4, model=NORMED_AND_ROTATED),
    "rope and tensor parallelism": Case(4, {**CP2, "tensor_parallel_size": 2}, groups=2, model=ROTATED),
    "capped scores of documents": Case(
        4, CP4, groups=2, documents=True, model={**NORMED_AND_ROTATED, "attention_logit_cap": 0.8}
    ),
}


def config_of(case: Case) -> RunConfig:
    model = {"layer_pattern": "M*-M", "mamba_num_groups": case.groups, "init_std": 0.2, **case.model}
    sections: dict[str, Any] = {"model": model, "parallel": case.parallel, "train": {"recompute": case.recompute}}
    return small_config(Path("unused"), Path("unused"), **sections)


def samples(case: Case) -> Batch:
    rng = np.random.default_rng(5)
    windows = [rng.integers(0, EOD, SEQ + 1) for _ in ENDS]
    for window, ends in zip(windows, ENDS, strict=True):
        window[ends] = EOD
    return build_batch(windows, [0] * len(ENDS), len(ENDS), SEQ, EOD if case.documents else None)


@dataclass(frozen=True)
class Returned:
    """By one rank."""

    weights: Arrays
    gradients: Arrays  # of the mean loss over the real tokens of all ranks
    nats_BS: np.ndarray
    tokens_BS: np.ndarray
    tokens_of_megatron_BS: np.ndarray  # what Megatron-Core would give this rank


def run_all_cases(names: Sequence[str]) -> dict[str, Returned]:
    """Take the samples through the model once for every case; cases of one layout."""
    found = {}
    with live_groups(config_of(CASES[names[0]])) as (platform, groups):
        part = SequencePart(groups.cp.rank(), groups.cp.size())
        for name in names:
            plan, ops = plan_run(config_of(CASES[name]), launched_rank().world_size), operations("torch")
            parts = choose_layer_parts(plan, platform)
            [chunk] = build_model_chunks(plan, build_transformer_config(plan, ops, parts), parts, ops, groups)
            whole = samples(CASES[name])
            mine = take_part(whole, part)
            nats_BS = chunk(mine.tokens_BS, mine.labels_BS, mine.document_BS)
            ((nats_BS * mine.loss_mask_BS).sum() / whole.loss_mask_BS.sum()).backward()
            found[name] = Returned(
                weights={key: to_array(parameter) for key, parameter in chunk.named_parameters()},
                gradients={key: to_array(parameter.grad) for key, parameter in chunk.named_parameters()},
                nats_BS=to_array(nats_BS),
                tokens_BS=to_array(mine.tokens_BS),
                tokens_of_megatron_BS=to_array(
                    get_batch_on_this_cp_rank({"tokens": whole.tokens_BS}, groups.cp)["tokens"]
                ),
            )
    return found


@pytest.fixture(scope="module")
def found(ranks: RankPool) -> dict[str, list[Returned]]:
    """What every rank returned, by case; cases of one layout run together."""
    layouts: dict[str, list[str]] = {}
    for name, case in CASES.items():
        layouts.setdefault(str(case.parallel), []).append(name)
    returned: dict[str, list[Returned]] = {}
    for names in layouts.values():
        of_ranks = ranks.run(run_all_cases, CASES[names[0]].world_size, names)
        returned.update({name: [one[name] for one in of_ranks] for name in names})
    return returned


@pytest.mark.parametrize("name", CASES)
def test_nats_and_gradients_equal_those_of_the_definition(found: dict[str, list[Returned]], name: str) -> None:
    """Fails if a rank's queries see other keys than they should, tokens come back in another order, a head is scanned
    with another's weights, or a rank that shares a group loses its share of the gradient."""
    case, config, whole = CASES[name], config_of(CASES[name]), samples(CASES[name])
    tp_size = config.parallel.tensor_parallel_size
    weights = join_ranks([rank.weights for rank in found[name][:tp_size]], tp_size, config.model)
    reference = reference_with(weights, config.model)
    expected_nats_BS = reference_nats(reference, whole)
    ((expected_nats_BS * whole.loss_mask_BS).sum() / whole.loss_mask_BS.sum()).backward()

    cp_size = case.parallel["context_parallel_size"]
    for number, rank in enumerate(found[name]):
        expected = to_array(SequencePart(number // tp_size, cp_size).cut_rows(expected_nats_BS))
        np.testing.assert_allclose(rank.nats_BS, expected, rtol=1e-4, atol=1e-4)

    added: list[Arrays] = []
    for tp_rank in range(tp_size):
        shares = [rank.gradients for rank in found[name][tp_rank::tp_size]]
        assert len(shares) == cp_size
        added.append({key: np.sum([share[key] for share in shares], axis=0) for key in shares[0]})
    gradients = join_ranks(added, tp_size, config.model)
    wrong = {}
    for key, parameter in reference.named_parameters():
        right = to_array(parameter.grad)
        wrong[key] = float(np.linalg.norm(gradients[key] - right) / np.linalg.norm(right))
    assert gradients.keys() == wrong.keys()
    assert {key: difference for key, difference in wrong.items() if not difference <= 1e-3} == {}


@pytest.mark.parametrize("name", ["two groups a rank", "two ranks a group"])
def test_ranks_hold_the_tokens_that_megatron_core_gives_them(found: dict[str, list[Returned]], name: str) -> None:
    """Fails if a rank holds tokens that Transformer Engine's attention takes for others."""
    for rank in found[name]:
        assert np.array_equal(rank.tokens_BS, rank.tokens_of_megatron_BS)
