"""Do the parts that Nemotron-H does not have (positions, biases, LayerNorm, norms of queries, keys, values and outputs,
caps) compute what their definition in plain torch does, under every layout? The loss, and the gradient of every
parameter."""

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.schema import Norm, PositionEmbedding, QkvNorm, Recompute, RunConfig
from nemotron_train.data.batch import Batch
from nemotron_train.model.init import take_shard
from nemotron_train.model.names import rule_for
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.plan.memory import rank_parameters
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.step import run_all
from nemotron_train.trainer import build_runtime
from tests.engine.live import (
    Arrays,
    gradients_of,
    live_groups,
    micro_batches,
    named_parameters,
    random_samples,
    reference_loss,
    reference_sizes,
    to_array,
)
from tests.model.whole import join_ranks
from tests.ranks import RankPool
from tests.small_runs import small_config

GPT: dict[str, Any] = dict(
    layer_pattern="*-*-",
    norm=Norm.layer,
    linear_bias=True,
    position_embedding=PositionEmbedding.learned,
    max_position_embeddings=40,
)
ROPE: dict[str, Any] = dict(layer_pattern="*-*-", position_embedding=PositionEmbedding.rope)
PARTS: dict[str, dict[str, Any]] = {
    "biases, LayerNorm and learned positions": GPT,
    "rope": ROPE,
    "rope with a base of its own": {**ROPE, "rope_base": 30.0, "attention_head_dim": 6},
    "norms of queries and keys": {**GPT, "qkv_norm": QkvNorm.qk},
    "rotated after RMSNorm": {**ROPE, "qkv_norm": QkvNorm.qk},
    "norms of outputs": {**GPT, "qkv_norm": QkvNorm.qk, "output_norm": True},
    "norms of queries, keys and values": {**GPT, "qkv_norm": QkvNorm.qkv},
    "capped": {**GPT, "qkv_norm": QkvNorm.qk, "attention_logit_cap": 1.5},
    "scaled": {**GPT, "attention_logit_scale": 0.5},
    "scaled and capped": {**ROPE, "attention_logit_scale": 3.0, "attention_logit_cap": 0.7},
    "layer scale": {**GPT, "layer_scale": 0.3},
    "hybrid": dict(
        layer_pattern="M*-M", norm=Norm.layer, position_embedding=PositionEmbedding.rope, qkv_norm=QkvNorm.qk,
        output_norm=True, layer_scale=0.4,
    ),
}  # fmt: skip
TP2_SP = dict(tensor_parallel_size=2, sequence_parallel=True)


@dataclass(frozen=True)
class Layout:
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    recompute: Recompute = Recompute.none
    documents: bool = False


LAYOUTS = {
    "one rank": Layout(),
    "recompute all": Layout(recompute=Recompute.full),
    "recompute the inside": Layout(recompute=Recompute.selective),
    "documents": Layout(documents=True),
    "tp2": Layout(2, dict(tensor_parallel_size=2)),
    "tp2_sp": Layout(2, TP2_SP),
    "tp2_sp documents": Layout(2, TP2_SP, documents=True),
    "pp2": Layout(2, dict(pipeline_parallel_size=2)),
    "tp2_sp_pp2": Layout(4, dict(**TP2_SP, pipeline_parallel_size=2)),
}


def config_of(parts: str, layout: Layout) -> RunConfig:
    sections: dict[str, Any] = {"parallel": layout.parallel, "train": {"recompute": layout.recompute}}
    return small_config(Path("unused"), Path("unused"), model=PARTS[parts], **sections)


def parts_of(layout: Layout) -> list[str]:
    """The parts that a layout takes: the norm of values needs sequence parallelism where heads are split."""
    split = layout.parallel.get("tensor_parallel_size", 1) > 1 and not layout.parallel.get("sequence_parallel")
    return [name for name in PARTS if not (split and PARTS[name].get("qkv_norm") is QkvNorm.qkv)]


def samples(config: RunConfig, layout: Layout) -> Batch:
    batch = random_samples(2, 4, config)
    if not layout.documents:
        return batch
    ends = torch.zeros_like(batch.tokens_BS)
    for row, places in enumerate(([4, 16, 17], [1, 20], [], [31])):
        ends[row, places] = 1
    return replace(batch, document_BS=ends.cumsum(1).int())


def awkward_reference(config: RunConfig) -> HybridModel:
    """A reference in which no parameter has a value (such as 0 for a bias) that would hide a mistake."""
    torch.manual_seed(3)
    model = HybridModel(reference_sizes(config.model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def train_all_parts(layout: Layout) -> dict[str, tuple[Arrays, float]]:
    """This rank's gradients of one global batch, and its nats, by parts."""
    found = {}
    names = parts_of(layout)
    with live_groups(config_of(names[0], layout)) as (platform, groups):
        for name in names:
            config = config_of(name, layout)
            run = build_runtime(plan_run(config, launched_rank().world_size), platform, groups)
            whole = awkward_reference(config).state_dict()
            with torch.no_grad():
                for key, parameter in named_parameters(run):
                    shard = take_shard(whole[key], rule_for(key), config.model, groups.tp.rank(), groups.tp.size())
                    parameter.copy_(shard)
            reports = run_all(run, micro_batches(samples(config, layout), 2), forward_only=False)
            found[name] = gradients_of(run), sum(float(report.nats_K.sum()) for report in reports)
    return found


class Found:
    def __init__(self, ranks: RankPool) -> None:
        self._ranks = ranks
        self.of = functools.cache(self._of)

    def _of(self, layout: str) -> list[dict[str, tuple[Arrays, float]]]:
        return self._ranks.run(train_all_parts, LAYOUTS[layout].ranks, LAYOUTS[layout])


@pytest.fixture(scope="module")
def found(ranks: RankPool) -> Found:
    return Found(ranks)


@pytest.mark.parametrize(
    ("layout", "parts"), [(layout, parts) for layout in LAYOUTS for parts in parts_of(LAYOUTS[layout])]
)
def test_losses_and_gradients_equal_those_of_the_definition(found: Found, layout: str, parts: str) -> None:
    """Fails if a part is left out, computes something else, or a rank's share of a gradient is missing or doubled; with
    documents, if places do not begin anew in each or an end is looked across."""
    returned, config = [rank[parts] for rank in found.of(layout)], config_of(parts, LAYOUTS[layout])
    plan = plan_run(config, len(returned))
    for number, (arrays, _) in enumerate(returned):
        planned = rank_parameters(plan, number // plan.layout.tensor)
        assert sum(gradient.size for gradient in arrays.values()) == planned
    gradients = join_ranks([arrays for arrays, _ in returned], config.parallel.tensor_parallel_size, config.model)
    reference, batch = awkward_reference(config), samples(config, LAYOUTS[layout])
    loss = reference_loss(reference, batch)
    loss.backward()
    assert returned[-1][1] == pytest.approx(float(loss.detach() * batch.loss_mask_BS.sum()), rel=1e-5)
    expected = {name: to_array(parameter.grad) for name, parameter in reference.named_parameters()}
    assert gradients.keys() == expected.keys()
    wrong = {}
    for name, gradient in expected.items():
        # Softmax does not see a constant added to all keys: the gradient of their bias is zero but for rounding.
        scale = np.linalg.norm(gradient) + 1e-3 * np.linalg.norm(expected["embedding.word_embeddings.weight"])
        wrong[name] = float(np.linalg.norm(gradients[name] - gradient) / scale)
    assert {name: difference for name, difference in wrong.items() if not difference <= 1e-3} == {}


@pytest.mark.parametrize("parts", PARTS)
def test_a_part_changes_what_is_computed(parts: str) -> None:
    """Fails if the definition itself ignores a key: without any one of them the same weights give another loss."""
    config = config_of(parts, LAYOUTS["one rank"])
    batch = samples(config, LAYOUTS["one rank"])
    sizes, model = reference_sizes(config.model), awkward_reference(config)
    loss = float(reference_loss(model, batch).detach())
    defaults = reference_sizes(small_config(Path("unused"), Path("unused")).model)
    for key in PARTS[parts].keys() - {"layer_pattern", "attention_head_dim", "max_position_embeddings"}:
        without = HybridModel(replace(sizes, **{key: getattr(defaults, key)}))
        missing, _ = without.load_state_dict(model.state_dict(), strict=False)
        assert float(reference_loss(without, batch).detach()) != pytest.approx(loss, rel=1e-6), (key, missing)
