"""`python -m benchmarks.planner_points`, which measures how far the planner is off, with a tiny model on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import planner_points
from benchmarks.train_step import write_corpus
from nemotron_train.plan.measured import H200
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from tests.ranks import RankPool

VOCAB = 512
TINY = (
    "model.layer_pattern=M*-", "model.hidden_size=64", "model.ffn_hidden_size=64", "model.num_attention_heads=4",
    "model.num_query_groups=2", "model.attention_head_dim=16", "model.mamba_num_heads=16", "model.mamba_head_dim=8",
    "model.mamba_num_groups=2", "model.mamba_state_dim=16", "model.mamba_chunk_size=32", f"model.vocab_size={VOCAB}",
    "train.seq_length=128",
)  # fmt: skip
NAMES = ("slice_bf16_8k", "slice_fp8_block_16k_full")


def _measure(corpus: Path, output: Path) -> list[dict[str, Any]]:
    me = launched_rank()
    place = planner_points.Place(me, choose_platform(me), H200, corpus, TINY)
    return planner_points.measure_points(NAMES, place, output)


def test_points_are_measured_one_after_the_other_in_one_process(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a point cannot follow another in the same processes, or a line lacks what was planned or measured."""
    write_corpus(tmp_path, VOCAB)
    (records,) = ranks.run(_measure, 1, tmp_path, tmp_path / "points.jsonl")
    assert [record["point"] for record in records] == list(NAMES)
    assert [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()] == records
    for record in records:
        assert record["planned_ms"] == pytest.approx(sum(record["planned_parts_ms"].values()))
        assert record["measured_ms"] in [pytest.approx(spent, abs=0.06) for spent in record["steps_ms"][2:]]
        assert len(set(record["losses"])) > 1, "the steps did not train"


@pytest.mark.parametrize("name", planner_points.POINTS)
def test_every_point_is_a_run_of_its_number_of_gpus(name: str, tmp_path: Path) -> None:
    """Fails if a point is refused, or its own settings do not reach the run."""
    point = planner_points.POINTS[name]
    plan = plan_run(planner_points.configure(point, tmp_path, ()), point.gpus)
    config, parts = plan.config, name.split("_")
    assert plan.layout.tensor == point.gpus == (1 if parts[0] == "slice" else 2)
    assert config.precision.format.value in name
    assert f"{config.train.seq_length // 1024}k" in parts
    assert config.train.recompute.value == (parts[-1] if parts[-1] in ("full", "selective") else "none")
