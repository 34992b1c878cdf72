"""Do gradients and moments in bfloat16 take the steps of float32 ones, on a GPU (Transformer Engine's AdamW)?"""

import math
import tempfile
from dataclasses import replace

import pytest
import torch

from nemotron_train.config.load import load_config
from nemotron_train.data.batch import build_batch
from nemotron_train.engine.groups import process_groups
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.step import train_step
from nemotron_train.trainer import build_runtime
from tests.engine.test_transformer_engine import MODEL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

STEPS = 5


def losses_and_norms(*overrides: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps on the same four samples, clipped to a hundredth."""
    config = load_config(
        [
            *MODEL,
            "precision=bf16",
            "optim.clip_grad_norm=0.01",
            "lr.warmup_tokens=1",
            "train.micro_batch_size=1",
            *overrides,
        ]
    )
    config = replace(config, run=replace(config.run, dir=tempfile.mkdtemp()))
    me, plan = launched_rank(), plan_run(config, 1)
    windows = torch.randint(0, 4096, (4, 1, 513), generator=torch.Generator().manual_seed(3)).numpy()
    batches = [build_batch(list(rows), [0], 1, 512) for rows in windows]
    platform = choose_platform(me)
    with process_groups(plan.layout, platform, me, timeout_seconds=60, seed=1) as groups:
        run = build_runtime(plan, platform, groups)
        results = [train_step(run, batches, (1 + step) * plan.tokens_per_step) for step in range(STEPS)]
    assert all(result.updated for result in results)
    return [(result.loss.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("low", [("moments",), ("gradients", "moments")])
def test_steps_are_those_of_float32(low: tuple[str, ...]) -> None:
    """Fails if norm or clipping reads the float32 gradients of A_log, D and dt_bias as if they were bfloat16."""
    found = losses_and_norms(*(f"optim.{name}=bf16" for name in low))
    for (loss, norm), (right_loss, right_norm) in zip(found, losses_and_norms(), strict=True):
        assert math.isclose(loss, right_loss, rel_tol=0.005)
        assert math.isclose(norm, right_norm, rel_tol=0.05)
    assert found[-1][0] < found[0][0]
