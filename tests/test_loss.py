"""Is the loss, and its gradient, the mean over the real tokens of the whole batch, however these are cut up? The same
for evaluation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.schema import RunConfig
from nemotron_train.data.batch import Batch, build_batch, take_part
from nemotron_train.data.heldout import heldout_batches
from nemotron_train.data.run_data import open_run_data
from nemotron_train.evaluate import evaluate, pad_to_multiple
from nemotron_train.loss import MeanLoss, add_reports, mean_loss, sum_losses
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.step import average_over_ranks, run_all, train_step
from nemotron_train.trainer import build_runtime
from tests.engine.live import (
    Arrays,
    gradients_of,
    live_groups,
    live_run,
    micro_batches,
    random_samples,
    reference_loss,
    reference_nats,
    reference_with,
    to_array,
    weights_of,
)
from tests.ranks import RankPool
from tests.small_runs import SEQ, small_config

REAL_TOKENS = [32, 0, 17, 1, 9, 32, 30, 2]  # the second sample is all padding, so is its micro-batch of one


def hand_batch() -> Batch:
    return Batch(
        tokens_BS=torch.zeros(3, 2, dtype=torch.int64),
        labels_BS=torch.zeros(3, 2, dtype=torch.int64),
        loss_mask_BS=torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]),
        source_B=torch.tensor([2, 0, 2]),
    )


def test_sums_by_source_equal_a_hand_count() -> None:
    """Fails if padding counts, a sample's loss goes to another source, or the step's tokens do not divide: nats 1+2 and
    16 to source 2, 4 to source 0."""
    loss_BS = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]], requires_grad=True)
    total, count, report = sum_losses(loss_BS, batch=hand_batch(), num_sources=3, tokens_in_step=torch.tensor(2))
    total.backward()
    assert total.item() == 11.5
    assert (count.item(), count.dtype) == (4, torch.int32)
    assert torch.equal(loss_BS.grad, hand_batch().loss_mask_BS / 2)
    assert report.nats_K.tolist() == [4.0, 0.0, 19.0]
    assert report.tokens_K.tolist() == [1.0, 0.0, 3.0]
    mean = mean_loss(add_reports([report, report], 3, torch.device("cpu")))
    assert (mean.loss, mean.tokens) == (23 / 4, 8)
    assert mean.by_source[::2] == (4.0, 19 / 3)
    assert math.isnan(mean.by_source[1])


def loss_and_gradients(configs: dict[int, RunConfig]) -> dict[int, tuple[MeanLoss, Arrays, Arrays]]:
    """The same eight samples in micro-batches of several sizes."""
    found = {}
    with live_groups(next(iter(configs.values()))) as (platform, groups):
        for size, config in configs.items():
            run = build_runtime(plan_run(config, 1), platform, groups)
            samples = random_samples(4, 8, config, real_tokens=REAL_TOKENS)
            reports = run_all(run, micro_batches(samples, size), forward_only=False)
            found[size] = average_over_ranks(run, reports), gradients_of(run), weights_of(run)
    return found


def test_micro_batch_size_changes_neither_loss_nor_gradient(ranks: RankPool) -> None:
    """Fails if a micro-batch with few real tokens weighs as much as a full one, in the gradient or in the report."""
    model = {"layer_pattern": "M*-", "init_std": 0.2}
    configs = {
        size: small_config(Path("unused"), Path("unused"), model=model, train={"micro_batch_size": size})
        for size in (1, 2, 4)
    }
    [found] = ranks.run(loss_and_gradients, 1, configs)
    samples = random_samples(4, 8, configs[1], real_tokens=REAL_TOKENS)
    reference = reference_with(found[1][2], configs[1].model)
    expected = reference_loss(reference, samples)
    expected.backward()
    with torch.no_grad():
        nats_BS = reference_nats(reference, samples) * samples.loss_mask_BS
    by_source = [float(nats_BS[k::2].sum()) / sum(REAL_TOKENS[k::2]) for k in (0, 1)]
    for mean, gradients, _ in found.values():
        assert mean.tokens == sum(REAL_TOKENS)
        assert mean.loss == pytest.approx(expected.item(), rel=1e-5)
        assert mean.by_source == pytest.approx(by_source, rel=1e-5)
        for name, parameter in reference.named_parameters():
            difference = np.linalg.norm(gradients[name] - to_array(parameter.grad))
            assert difference <= 1e-4 * np.linalg.norm(to_array(parameter.grad)), name


def test_padding_micro_batches_carry_no_loss() -> None:
    """Fails if rounding up to whole rounds of the interleaved schedule counts a micro-batch twice."""
    padded = pad_to_multiple([hand_batch()] * 5, 4)
    assert len(padded) == 8
    assert [float(batch.loss_mask_BS.sum()) for batch in padded] == [4.0] * 5 + [0.0] * 3
    assert len(pad_to_multiple([hand_batch()] * 4, 4)) == 4


def evaluate_twice(config: RunConfig) -> tuple[list[MeanLoss], Arrays, bool]:
    """Held-out losses before and after two training steps; the weights at the end; whether the model still trains."""
    data, means = open_run_data(config), []
    with live_run(config) as run:
        share = run.share
        heldout = list(heldout_batches(data.heldout, config.train.eval_tokens, SEQ, share))
        means.append(evaluate(run, heldout))
        for step in (3, 4):  # past the first step, whose rate is 0
            samples = take_part(random_samples(step, 8, config), share.part)
            train_step(
                run,
                micro_batches(samples, config.train.micro_batch_size, share.dp_rank, share.dp_size),
                consumed_tokens=step * 256,
            )
        means.append(evaluate(run, heldout))
        again = evaluate(run, heldout)
        assert (again.loss, again.tokens) == (means[1].loss, means[1].tokens), "evaluation must change nothing"
        return means, weights_of(run), all(chunk.training for chunk in run.chunks)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2_overlapped_gather": (2, {"overlap_param_gather": True}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp2_vpp2": (2, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
}
WINDOWS = 35  # odd, and more micro-batches than evaluation takes at once


def heldout_config(corpus: Path, layout: dict[str, Any], micro_batch_size: int = 1) -> RunConfig:
    return small_config(
        corpus, Path("unused"), model={"layer_pattern": "M*-M", "init_std": 0.1}, parallel=layout,
        train={"micro_batch_size": micro_batch_size, "eval_tokens": WINDOWS * SEQ + SEQ // 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(ranks: RankPool, corpus: Path) -> tuple[list[MeanLoss], Arrays, bool]:
    return ranks.run(evaluate_twice, 1, heldout_config(corpus, {}))[0]


def heldout_reference(corpus: Path, weights: Arrays) -> float:
    """The mean over all windows at once, read one by one, by the plain-torch definition."""
    config = heldout_config(corpus, {})
    source = open_run_data(config).heldout[0]
    assert source is not None
    windows = [source.read(number * SEQ, SEQ + 1) for number in range(WINDOWS)]
    batch = build_batch(windows, [0] * WINDOWS, num_rows=WINDOWS, seq_length=SEQ)
    with torch.no_grad():
        return float(reference_nats(reference_with(weights, config.model), batch).mean())


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_evaluation_is_the_mean_over_the_real_windows(
    ranks: RankPool, corpus: Path, alone: tuple[list[MeanLoss], Arrays, bool], micro_batch_size: int
) -> None:
    """Fails if rows of padding count (35 windows are 9 micro-batches of 4), a window is left out, or evaluation changes
    the model."""
    means, weights, still_training = alone
    if micro_batch_size != 1:
        means, weights, still_training = ranks.run(evaluate_twice, 1, heldout_config(corpus, {}, micro_batch_size))[0]
    assert means[1].tokens == WINDOWS * SEQ
    assert means[1].loss == pytest.approx(heldout_reference(corpus, weights), rel=1e-5)
    assert means[1].by_source[0] == means[1].loss
    assert math.isnan(means[1].by_source[1])  # this source has no held-out shards
    assert means[1].loss != pytest.approx(means[0].loss, rel=1e-3)
    assert still_training


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_does_not_depend_on_the_layout(
    ranks: RankPool, corpus: Path, alone: tuple[list[MeanLoss], Arrays, bool], layout: str
) -> None:
    """Fails if a rank's share counts twice, uneven shares end unevenly, or overlapped gathers do not go with it."""
    world_size, parallel = LAYOUTS[layout]
    for means, _, still_training in ranks.run(evaluate_twice, world_size, heldout_config(corpus, parallel)):
        assert [mean.tokens for mean in means] == [WINDOWS * SEQ] * 2
        assert [mean.loss for mean in means] == pytest.approx([mean.loss for mean in alone[0]], rel=1e-5)
        assert still_training
