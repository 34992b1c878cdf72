"""The curve, against Megatron-Core's scheduler and against numbers worked out by hand."""

from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemotron_train.config.schema import DecayShape, LrSchedule, LrSection
from nemotron_train.plan.lr_curve import learning_rate

TRAIN, WARMUP, DECAY = 10_000, 700, 2_300
CURVES = [
    *(LrSection(LrSchedule.wsd, 4.5e-4, 4.5e-6, WARMUP, DECAY, shape) for shape in DecayShape),
    LrSection(LrSchedule.wsd, 4.5e-4, 0.0, 0, DECAY, DecayShape.linear),
    LrSection(LrSchedule.cosine, 8e-4, 8e-6, WARMUP),
    LrSection(LrSchedule.cosine, 8e-4, 8e-6, 0),
    LrSection(LrSchedule.constant, 4.5e-6, None, WARMUP),
    LrSection(LrSchedule.constant, 4.5e-6, None, 0),
]


def megatron_core_rate(lr: LrSection, consumed: int) -> float:
    group: dict = {}
    OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), init_lr=0.0, max_lr=lr.peak, min_lr=lr.min or 0.0,
        lr_warmup_steps=lr.warmup_tokens, lr_decay_steps=TRAIN,
        lr_decay_style="WSD" if lr.schedule is LrSchedule.wsd else lr.schedule.value,
        start_wd=0.1, end_wd=0.1, wd_incr_steps=1, wd_incr_style="constant",
        wsd_decay_steps=lr.decay_tokens, lr_wsd_decay_style=lr.decay_shape and lr.decay_shape.value,
    ).step(consumed)  # fmt: skip
    return group["lr"]


@pytest.mark.parametrize("lr", CURVES, ids=lambda lr: f"{lr.schedule.value}-{lr.decay_shape}-{lr.warmup_tokens}")
def test_the_curve_is_megatron_cores(lr: LrSection) -> None:
    """Fails if any point of the curve, its corners and what lies past its end included, differs."""
    corners = {
        0,
        1,
        WARMUP - 1,
        WARMUP,
        WARMUP + 1,
        TRAIN - DECAY,
        TRAIN - DECAY + 1,
        TRAIN - 1,
        TRAIN,
        TRAIN + 1,
        2 * TRAIN,
    }
    for consumed in sorted(corners | set(range(0, TRAIN, 97))):
        assert learning_rate(lr, TRAIN, consumed) == pytest.approx(megatron_core_rate(lr, consumed), rel=1e-12), (
            consumed
        )


@pytest.mark.parametrize(
    ("shape", "half_way"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", 2 * 0.5**0.5 - 1), ("minus_sqrt", 1 - 0.5**0.5)],
)
def test_wsd_warms_up_holds_and_decays_in_its_shape(shape: str, half_way: float) -> None:
    """Fails if a shape is another one, or the decay does not end at train_tokens with lr.min."""
    lr = LrSection(
        LrSchedule.wsd, peak=1.0, min=0.2, warmup_tokens=100, decay_tokens=400, decay_shape=DecayShape(shape)
    )
    points = {0: 0.0, 50: 0.5, 100: 1.0, 600: 1.0, 800: 0.2 + 0.8 * half_way, 1000: 0.2, 5000: 0.2}
    assert {tokens: learning_rate(lr, 1000, tokens) for tokens in points} == pytest.approx(points)
