"""What is every logged number called, in which unit is it, and how was it put together from ranks and micro-batches?

One table, `METRICS`, is the answer for `metrics.jsonl`, the console and wandb alike; writers refuse any other name.
A name that ends in `/SOURCE` stands for one name per data source: `loss/code`, `eval_loss/prose`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

Record: TypeAlias = Mapping[str, int | float | None]

SOURCE_SUFFIX = "/SOURCE"


class Reduction(str, Enum):
    """How one number is made of what the ranks and micro-batches of a step hold."""

    same = "same"  # every rank knows the same value
    token_weighted = "token_weighted"  # sum over real tokens of all ranks, divided by their number
    slowest = "slowest"  # ranks wait for each other, so any rank's clock shows the slowest
    global_norm = "global_norm"  # over the parameters of all ranks, each counted once


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    reduction: Reduction
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("step", "steps", Reduction.same, "optimizer steps taken, this one included; one object per step"),
    Metric("consumed_tokens", "tokens", Reduction.same, "tokens trained on up to and including this step"),
    Metric("phase", "index", Reduction.same, "0-based phase of the blend that this step drew from"),
    Metric("seq_length", "tokens", Reduction.same, "tokens of a sample of this step"),
    Metric("global_batch_size", "samples", Reduction.same, "samples of this step over all ranks"),
    Metric("loss", "nats per real token", Reduction.token_weighted, "training loss of this step, before its update"),
    Metric("loss/SOURCE", "nats per real token", Reduction.token_weighted, "`loss` of one source"),
    Metric("eval_loss", "nats per real token", Reduction.token_weighted, "held-out loss after this step's update"),
    Metric("eval_loss/SOURCE", "nats per real token", Reduction.token_weighted, "`eval_loss` of one source"),
    Metric("eval_seconds", "s", Reduction.slowest, "wall time of the evaluation after this step"),
    Metric("grad_norm", "L2 norm", Reduction.global_norm, "norm of the whole gradient before clipping"),
    Metric("learning_rate", "per step", Reduction.same, "learning rate that this step used"),
    Metric("skipped_steps", "steps", Reduction.same, "steps of the run so far whose gradient was not finite"),
    Metric("step_seconds", "s", Reduction.slowest, "wall time of this step, evaluation and checkpoints not counted"),
    Metric("tokens_per_second_per_gpu", "tokens/s", Reduction.slowest, "tokens of the step / step_seconds / ranks"),
    Metric("model_tflops_per_gpu", "TFLOP/s", Reduction.slowest, "model FLOPs (no recompute) / step_seconds / ranks"),
    Metric("seconds_left", "s", Reduction.slowest, "training time left at the speed of the last steps"),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


def metric_named(name: str) -> Metric:
    """Return the table's row for a logged name.

    Raises:
        ValueError: the name is in no row. That is a bug of the caller, never the user's: add a row to `METRICS`.
    """
    stem, _, source = name.partition("/")
    metric = _BY_NAME.get(stem + SOURCE_SUFFIX if source else name)
    if metric is None or name.endswith(SOURCE_SUFFIX):
        raise ValueError(f"{name!r} is not a metric: add a row with its unit and meaning to METRICS in {__name__}")
    return metric


def check_record(record: Record) -> int:
    """Return the step of a record; raise ValueError when it has none or holds a name outside the table."""
    for name in record:
        metric_named(name)
    step = record.get("step")
    if not isinstance(step, int):
        raise ValueError(f"a record needs an integer `step`, this one has only {sorted(record)}")
    return step
