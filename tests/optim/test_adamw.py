"""Is a step of the distributed optimizer the step that torch's AdamW takes on one rank, with the gradients of the whole
batch?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.schema import OptimSection, RunConfig
from nemotron_train.engine.adamw_in_parts import update_in_parts
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.step import train_step
from nemotron_train.trainer import build_runtime
from tests.engine.live import (
    CONSTANT_RATE,
    Arrays,
    live_groups,
    live_run,
    micro_batches,
    random_samples,
    reference_loss,
    reference_with,
    to_array,
    weights_of,
)
from tests.ranks import RankPool
from tests.small_runs import small_config

STEPS = 3
# Unequal, so that a mean over micro-batches or ranks is not the mean over tokens.
REAL_TOKENS = [32, 5, 17, 1, 9, 32, 30, 2]
DECAYING = (
    "word_embeddings.weight", "output_layer.weight", "in_proj.weight", "out_proj.weight", "conv1d.weight",
    "linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight",
)  # fmt: skip
# Epsilon is large enough that a gradient of rounding errors alone, where the true one is 0, does not move a weight.
OPTIM = OptimSection(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-4, weight_decay=0.5, clip_grad_norm=0.1)


def config_with(**optim: Any) -> RunConfig:
    config = small_config(
        Path("unused"),
        Path("unused"),
        model={"layer_pattern": "M*-M", "init_std": 0.1},
        lr={**CONSTANT_RATE, "peak": 3e-3},
    )
    return replace(config, optim=replace(OPTIM, **optim))


def take_steps(config: RunConfig, micro_batch_size: int) -> list[tuple[float, Arrays]]:
    """The gradient norm and this rank's weights after each step; the first entry is before any."""
    with live_run(config) as run:
        history = [(0.0, weights_of(run))]
        for step in range(STEPS):
            samples = random_samples(step, 8, config, real_tokens=REAL_TOKENS)
            mine = micro_batches(samples, micro_batch_size, run.groups.dp.rank(), run.groups.dp.size())
            result = train_step(run, mine, consumed_tokens=step * 8 * 32)
            assert result.updated
            history.append((result.grad_norm, weights_of(run)))
    return history


def torch_steps(config: RunConfig, start: Arrays) -> list[tuple[float, Arrays]]:
    """The same by torch, from the same weights, with plain autograd and no ranks."""
    optim = config.optim
    model = reference_with(start, config.model)
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith(DECAYING)].append(parameter)
    assert all(groups.values())
    adamw = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": optim.weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=config.lr.peak, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_epsilon,
    )  # fmt: skip
    history = [(0.0, start)]
    for step in range(STEPS):
        adamw.zero_grad()
        reference_loss(model, random_samples(step, 8, config, real_tokens=REAL_TOKENS)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm or float("inf"))
        adamw.step()
        history.append((float(norm), {name: to_array(parameter) for name, parameter in model.named_parameters()}))
    return history


def assert_same(found: list[tuple[float, Arrays]], expected: list[tuple[float, Arrays]]) -> None:
    for step, ((norm, weights), (expected_norm, expected_weights)) in enumerate(zip(found, expected, strict=True)):
        assert norm == pytest.approx(expected_norm, rel=1e-4), f"gradient norm of step {step}"
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            np.testing.assert_allclose(
                weight, expected_weights[name], rtol=0, atol=1e-6, err_msg=f"{name} after step {step}"
            )


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_three_steps_on_two_data_parallel_ranks_are_those_of_torch(ranks: RankPool, micro_batch_size: int) -> None:
    """Fails if gradients are not those of the mean over all real tokens, clipping sees a part of them, or a wrong
    weight decays."""
    config = replace(config_with(), train=replace(config_with().train, micro_batch_size=micro_batch_size))
    first, second = ranks.run(take_steps, 2, config, micro_batch_size)
    expected = torch_steps(config, first[0][1])
    assert all(norm > config.optim.clip_grad_norm for norm, _ in expected[1:]), "clipping must have something to do"
    assert_same(first, expected)
    assert_same(second, expected)
    for weights, others in zip(first, second, strict=True):
        assert all(np.array_equal(weights[1][name], others[1][name]) for name in weights[1])


OPTIONS: dict[str, dict[str, float]] = {
    "as above": {},
    "beta1": dict(adam_beta1=0.5),
    "beta2": dict(adam_beta2=0.5),
    "epsilon": dict(adam_epsilon=1e-2),
    "no decay": dict(weight_decay=0.0),
    "clipped harder": dict(clip_grad_norm=0.01),
    "not clipped": dict(clip_grad_norm=0.0),
}


def take_steps_with_every_option() -> dict[str, list[tuple[float, Arrays]]]:
    histories = {}
    with live_groups(config_with()) as (platform, groups):
        for key, optim in OPTIONS.items():
            config = config_with(**optim)
            run = build_runtime(plan_run(config, launched_rank().world_size), platform, groups)
            history = histories[key] = [(0.0, weights_of(run))]
            for step in range(STEPS):
                samples = random_samples(step, 8, config, real_tokens=REAL_TOKENS)
                result = train_step(run, micro_batches(samples, 2), consumed_tokens=step * 8 * 32)
                history.append((result.grad_norm, weights_of(run)))
    return histories


@pytest.fixture(scope="module")
def by_option(ranks: RankPool) -> dict[str, list[tuple[float, Arrays]]]:
    return ranks.run(take_steps_with_every_option, 1)[0]


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_does_what_it_does_in_torch(by_option: dict[str, list[tuple[float, Arrays]]], key: str) -> None:
    """Fails if a key of `optim` is ignored, or reaches another argument of AdamW."""
    assert_same(by_option[key], torch_steps(config_with(**OPTIONS[key]), by_option[key][0][1]))
    if key != "as above":
        usual, found = by_option["as above"][-1][1], by_option[key][-1][1]
        moved = max(float(np.abs(usual[name] - found[name]).max()) for name in usual)
        assert moved > 2e-5


def test_an_update_in_parts_is_the_whole_update() -> None:
    """Fails if a weight is left out or updated twice, if parts grow beyond what they may hold, or if a step that breaks
    off leaves the optimizer with one part of its weights."""
    sizes = [(3,), (2, 2), (9,), (1,), (1,), (4,)]
    random = torch.Generator().manual_seed(1)
    start = [torch.randn(size, generator=random) for size in sizes]

    class Counting(torch.optim.AdamW):
        """Writes down how many elements each step had."""

        def step(self, closure: Any = None) -> None:
            seen.append(sum(weight.numel() for group in self.param_groups for weight in group["params"]))
            super().step(closure)

    def weights_after(in_parts: bool) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        adam = Counting([{"params": weights[:3]}, {"params": weights[3:], "lr": 0.5}], lr=0.1)
        if in_parts:
            update_in_parts(adam, at_once=7)
        for step in range(3):
            for number, weight in enumerate(weights):
                weight.grad = torch.full_like(weight, 0.1 * number - step)
            adam.step()
        updated = [weight.detach().clone() for weight in weights]
        weights[4].grad = torch.zeros(1).to_sparse()
        with pytest.raises(RuntimeError):
            adam.step()
        assert [len(group["params"]) for group in adam.param_groups] == [3, 3]
        return updated

    seen: list[int] = []
    whole = weights_after(False)
    seen.clear()
    parts = weights_after(True)
    assert seen[:3] == [7, 9, 6]
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
