"""Is each kind of layer, as GPUs run it in bf16, the plain-torch definition in float64, on one GPU and on two?"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.batch import Batch
from nemotron_train.step import average_over_ranks, run_all
from tests.engine.live import (
    Arrays,
    gradients_of,
    live_run,
    micro_batches,
    random_samples,
    reference_loss,
    reference_with,
    to_array,
    weights_of,
)
from tests.engine.test_transformer_engine import MODEL
from tests.model.whole import join_ranks
from tests.ranks import RankPool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

PATTERNS = {"mamba": "MM", "attention": "**", "mlp": "--", "all": "M*-M"}
TENSOR_2 = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")
BF16_GRADIENT = 0.03  # relative L2: bf16 keeps 8 bits, and a gradient passes through a few dozen roundings


def config_of(pattern: str, *overrides: str) -> RunConfig:
    changes = (f"model.layer_pattern={pattern}", "precision=bf16", "train.micro_batch_size=2", "run.dir=unused")
    return load_config([*MODEL, *changes, *overrides])


def samples_of(config: RunConfig) -> Batch:
    samples = random_samples(2, 4, config)
    return replace(samples, source_B=torch.zeros_like(samples.source_B))  # the experiment has one source


def loss_and_gradients(config: RunConfig) -> tuple[float, Arrays, Arrays]:
    """On this rank: the loss of one global batch, weights and gradients."""
    with live_run(config) as run:
        reports = run_all(run, micro_batches(samples_of(config), 2), forward_only=False)
        return average_over_ranks(run, reports).loss, weights_of(run), gradients_of(run)


def differences(gradients: Arrays, expected: Arrays) -> dict[str, float]:
    assert gradients.keys() == expected.keys()
    return {
        name: float(np.linalg.norm(gradients[name] - expected[name]) / np.linalg.norm(expected[name]))
        for name in expected
    }


def of_the_definition(config: RunConfig, weights: Arrays) -> tuple[float, Arrays]:
    reference = reference_with(weights, config.model).to("cuda", torch.float64)
    loss = reference_loss(reference, samples_of(config).to("cuda"))
    loss.backward()
    return loss.item(), {name: to_array(parameter.grad) for name, parameter in reference.named_parameters()}


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_layer_in_bf16_is_its_definition(ranks: RankPool, kind: str) -> None:
    """Fails if a kernel, or the order in which it reads a packed projection, computes something else."""
    config = config_of(PATTERNS[kind])
    loss, weights, gradients = ranks.run(loss_and_gradients, 1, config)[0]
    expected_loss, expected = of_the_definition(config, weights)
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    wrong = differences(gradients, expected)
    assert {name: difference for name, difference in wrong.items() if not difference <= BF16_GRADIENT} == {}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", PATTERNS)
def test_a_layer_on_two_gpus_is_its_definition(ranks: RankPool, kind: str) -> None:
    """Fails if a rank's share of a layer, or its part of the sequence, is lost, doubled or another's."""
    config = config_of(PATTERNS[kind], *TENSOR_2)
    returned: list[Any] = ranks.run(loss_and_gradients, 2, config)
    weights, gradients = (join_ranks([rank[part] for rank in returned], 2, config.model) for part in (1, 2))
    expected_loss, expected = of_the_definition(config, weights)
    assert returned[0][0] == pytest.approx(expected_loss, rel=1e-3)
    wrong = differences(gradients, expected)
    assert {name: difference for name, difference in wrong.items() if not difference <= BF16_GRADIENT} == {}
