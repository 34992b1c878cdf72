"""What is the learning rate after so many tokens: warm-up, hold, decay.

The same curves as Megatron-Core's `OptimizerParamScheduler`, in tokens, so that a change of batch size does not bend
them.
"""

import math

from nemotron_train.config.schema import DecayShape, LrSchedule, LrSection


def learning_rate(lr: LrSection, train_tokens: int, consumed_tokens: int) -> float:
    """Return the rate of the step that starts after `consumed_tokens`; the first step of a warm-up has rate 0."""
    if lr.warmup_tokens > 0 and consumed_tokens <= lr.warmup_tokens:
        return lr.peak * consumed_tokens / lr.warmup_tokens
    if lr.schedule is LrSchedule.constant:
        return lr.peak
    assert lr.min is not None, "plan.rules asks for lr.min"
    if consumed_tokens > train_tokens:
        return lr.min
    return lr.min + _decay_factor(lr, train_tokens, consumed_tokens) * (lr.peak - lr.min)


def _decay_factor(lr: LrSection, train_tokens: int, consumed_tokens: int) -> float:
    """Return how much of the way from min to peak is left: 1 at the peak, 0 at train_tokens."""
    if lr.schedule is LrSchedule.cosine:
        progress = (consumed_tokens - lr.warmup_tokens) / (train_tokens - lr.warmup_tokens)
        return _shape(DecayShape.cosine, progress)
    assert lr.decay_tokens is not None, "plan.rules asks for lr.decay_tokens"
    assert lr.decay_shape is not None, "plan.rules asks for lr.decay_shape"
    decay_start = train_tokens - lr.decay_tokens
    if consumed_tokens <= decay_start:
        return 1.0
    return _shape(lr.decay_shape, (consumed_tokens - decay_start) / lr.decay_tokens)


def _shape(shape: DecayShape, progress: float) -> float:
    if shape is DecayShape.linear:
        return 1.0 - progress
    if shape is DecayShape.cosine:
        return 0.5 * (math.cos(math.pi * progress) + 1.0)
    if shape is DecayShape.exponential:  # a half-life that reaches 0 at the end
        return 2.0 * 0.5**progress - 1.0
    return 1.0 - math.sqrt(progress)
