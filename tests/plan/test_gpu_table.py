"""Is a table of times that nobody could have measured refused, whatever its values are? Oracle: a shipped table with
one value changed. What a probe writes is held in `tests/probe/test_probe.py`."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.errors import ConfigError
from nemotron_train.plan import gpu_table
from nemotron_train.plan.gpu_table import read_gpu

SHIPPED = Path(gpu_table.__file__).parent / "tables" / "h200.json"
HUGE = 10**400  # JSON has such numbers; no float does


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("first_pass_ps_per_weight", 3, "first_pass_ps_per_weight is 3, expected a value for each format"),
        ("first_pass_ps_per_weight", ["fp8_block"], "expected a value for each format"),
        ("first_pass_ps_per_weight", "fp8", 'is "fp8", expected a value for each format'),
        ("layer_ms.mlp", 3, "layer_ms.mlp is 3, expected a value for each format"),
        ("layer_ms", [], "layer_ms.mamba is missing"),
        ("tokens", 0.5, "tokens is 0.5, expected a whole number"),
        ("tokens", HUGE, f"tokens is {HUGE}, expected a finite number"),
        ("head_ms", HUGE, "head_ms is 1000"),
        ("head_ms", float("inf"), "head_ms is Infinity, expected a finite number"),
        ("launch_ms.mlp.bf16", [1.0, HUGE], "launch_ms.mlp.bf16, backward, is 1000"),
        ("model.hidden_size", HUGE, "model.hidden_size is 1000"),
    ],
)
def test_a_value_that_cannot_be_is_refused(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    """Fails if a value of the wrong kind ends in a traceback or is planned by, or file and key are not named."""
    table, file = json.loads(SHIPPED.read_text(encoding="utf-8")), tmp_path / "mine.json"
    *sections, last = key.split(".")
    functools.reduce(lambda tree, name: tree[name], sections, table)[last] = value
    file.write_text(json.dumps(table))
    with pytest.raises(ConfigError) as refused:
        read_gpu(file, "a table")
    assert f"The table {file}" in str(refused.value)
    assert expected in str(refused.value)


def test_whole_tokens_may_be_written_as_a_float(tmp_path: Path) -> None:
    """Fails if 4096.0, as some programs write it, is refused, or reaches the planner as a float."""
    table = json.loads(SHIPPED.read_text(encoding="utf-8")) | {"tokens": 4096.0}
    (tmp_path / "mine.json").write_text(json.dumps(table))
    tokens = read_gpu(tmp_path / "mine.json", "a table").tokens
    assert (tokens, type(tokens)) == (4096, int)
