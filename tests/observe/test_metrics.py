"""Every logged name is explained, and nothing else is let through."""

import pytest

from nemotron_train.observe.metrics import METRICS, check_record, metric_named
from nemotron_train.observe.throughput import StepSpeed

REQUIRED = (
    "step consumed_tokens loss grad_norm learning_rate step_seconds tokens_per_second_per_gpu model_tflops_per_gpu"
)


@pytest.mark.parametrize("name", REQUIRED.split())
def test_every_name_that_readers_of_metrics_jsonl_rely_on_is_in_the_table(name: str) -> None:
    """Fails if a fixed name of the file is renamed or dropped."""
    assert metric_named(name).unit


def test_names_are_unique_and_all_explained() -> None:
    """Fails if two rows share a name, or a row has no unit or meaning."""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.unit and metric.meaning for metric in METRICS)


def test_a_source_name_is_found_by_its_pattern() -> None:
    """Fails if per-source names stop matching, or match the row of another metric."""
    assert metric_named("loss/code").name == "loss/SOURCE"
    assert metric_named("eval_loss/web/2024").name == "eval_loss/SOURCE"


@pytest.mark.parametrize("name", ["los", "train/loss", "loss/", "grad_norm/code", "loss/SOURCE", "", "/", "eval_loss "])
def test_names_outside_the_table_are_refused(name: str) -> None:
    """Fails if a typo, an undeclared pattern or the pattern itself could be logged."""
    with pytest.raises(ValueError, match="not a metric"):
        check_record({"step": 1, name: 0.0})


def test_a_record_without_a_step_is_refused() -> None:
    """Fails if numbers could be written that belong to no step."""
    with pytest.raises(ValueError, match="step"):
        check_record({"loss": 1.0})


def test_the_names_that_throughput_reports_are_in_the_table() -> None:
    """Fails if a field of StepSpeed is renamed without its row."""
    speed = StepSpeed(step_seconds=1.0, tokens_per_second_per_gpu=1.0, model_tflops_per_gpu=1.0, seconds_left=1.0)
    assert check_record({"step": 3} | speed.as_record()) == 3
