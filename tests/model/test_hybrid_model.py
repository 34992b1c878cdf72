"""Does the model that is trained compute what its plain-torch definition does? Logits, and the gradient of every
parameter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.schema import RunConfig
from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.engine.mcore_config import build_transformer_config
from nemotron_train.model.build import build_model_chunks
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.ops.implementations import operations
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.step import run_all
from tests.engine.live import (
    Arrays,
    gradients_of,
    live_groups,
    live_run,
    micro_batches,
    random_samples,
    reference_loss,
    reference_sizes,
    reference_with,
    to_array,
    weights_of,
)
from tests.model.whole import join_ranks
from tests.ranks import RankPool
from tests.small_runs import small_config

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {  # pattern, sequence length (chunk 16), other sizes
    "mamba only, one group": ("M", 13, dict(mamba_num_groups=1)),
    "attention and mlp only": ("*-", 9, {}),
    "all kinds, four groups": ("M-M*-", 32, {}),
    "two groups, one token over a chunk": ("MM*", 17, dict(mamba_num_groups=2)),
    "tied": ("-M*", 31, dict(tied_embeddings=True)),
    "one query group": ("*M", 21, dict(num_query_groups=1)),
    "a query group a head": ("M**", 7, dict(num_query_groups=4)),
    "chunk of one, three taps, other epsilon": (
        "MM-",
        11,
        dict(mamba_chunk_size=1, mamba_conv_kernel=3, norm_epsilon=0.1),
    ),
    "wide attention, narrow state": ("M*-", 33, dict(attention_head_dim=16, mamba_state_dim=3)),
}


def case_config(name: str) -> RunConfig:
    pattern, seq_length, changes = CASES[name]
    return small_config(
        Path("unused"), Path("unused"), model={"layer_pattern": pattern, **changes}, train={"seq_length": seq_length}
    )


def awkward_reference(config: RunConfig) -> HybridModel:
    """A reference in which no parameter has a value (such as 1 for a norm) that would hide a mistake."""
    torch.manual_seed(3)
    model = HybridModel(reference_sizes(config.model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def compare_all_cases() -> dict[str, dict[str, float]]:
    """On one rank: the largest difference of the logits, and the relative difference of every gradient, by case."""
    differences = {}
    with live_groups(case_config("tied")) as (platform, groups):
        for name in CASES:
            config = case_config(name)
            plan, ops = plan_run(config, 1), operations("torch")
            parts = choose_layer_parts(plan, platform)
            [ours] = build_model_chunks(plan, build_transformer_config(plan, ops, parts), parts, ops, groups)
            reference = awkward_reference(config)
            ours.load_state_dict(reference.state_dict())
            tokens_BS = random_samples(1, 3, config).tokens_BS
            logits, expected = ours(tokens_BS), reference(tokens_BS)
            found = differences[name] = {"logits": (logits - expected).abs().max().item()}
            cotangent = torch.randn_like(expected)
            logits.backward(cotangent)
            expected.backward(cotangent)
            gradients = dict(ours.named_parameters())
            for parameter_name, parameter in reference.named_parameters():
                gradient = gradients.pop(parameter_name).grad
                found[parameter_name] = float((gradient - parameter.grad).norm() / parameter.grad.norm())
            assert not gradients, f"parameters the reference does not have: {list(gradients)}"
    return differences


@pytest.fixture(scope="module")
def differences(ranks: RankPool) -> dict[str, dict[str, float]]:
    return ranks.run(compare_all_cases, 1)[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_the_definition(
    differences: dict[str, dict[str, float]], case: str
) -> None:
    """Fails if a layer computes something else, if packed rows are cut in another order, or a gradient is dropped."""
    found = dict(differences[case])
    assert found.pop("logits") <= 1e-4
    assert {name: value for name, value in found.items() if not value <= 1e-3} == {}
    assert len(found) >= 3


def gradients_through_the_schedule(config: RunConfig) -> tuple[Arrays, Arrays]:
    """This rank's weights and the gradients of one global batch in micro-batches of 2."""
    with live_run(config) as run:
        run_all(run, micro_batches(random_samples(2, 4, config), 2), forward_only=False)
        return weights_of(run), gradients_of(run)


SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, dict(tensor_parallel_size=2, sequence_parallel=True)),
    "tp2": (2, dict(tensor_parallel_size=2)),
    "tp4_sp": (4, dict(tensor_parallel_size=4, sequence_parallel=True)),
    "tp2_sp_pp2": (4, dict(tensor_parallel_size=2, sequence_parallel=True, pipeline_parallel_size=2)),
}


@pytest.mark.parametrize("split", SPLITS)
def test_gathered_gradients_of_a_split_model_equal_those_of_the_definition(ranks: RankPool, split: str) -> None:
    """Fails if a rank's part of a gradient is missing, doubled (norms under sequence parallelism), or of another head
    or group."""
    world_size, parallel = SPLITS[split]
    model = {"layer_pattern": "M*-M", "num_query_groups": 4, "init_std": 0.2}
    config = small_config(Path("unused"), Path("unused"), model=model, parallel=parallel)
    returned = ranks.run(gradients_through_the_schedule, world_size, config)
    tp_size = parallel["tensor_parallel_size"]
    weights = join_ranks([weights for weights, _ in returned], tp_size, config.model)
    gradients = join_ranks([gradients for _, gradients in returned], tp_size, config.model)

    reference = reference_with(weights, config.model)
    reference_loss(reference, random_samples(2, 4, config)).backward()
    expected = {name: to_array(parameter.grad) for name, parameter in reference.named_parameters()}
    assert gradients.keys() == expected.keys()
    wrong = {
        name: float(np.linalg.norm(gradients[name] - expected[name]) / np.linalg.norm(expected[name]))
        for name in expected
    }
    assert {name: difference for name, difference in wrong.items() if not difference <= 1e-3} == {}
