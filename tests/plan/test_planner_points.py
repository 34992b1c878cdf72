"""`python -m benchmarks.planner_points`, which measures how far the planner is off, with a tiny model on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import planner_points
from benchmarks.train_step import write_corpus
from nemotron_train.plan.measured import H200
from nemotron_train.plan.memory import memory_gib_per_gpu, plan_memory
from nemotron_train.plan.report import MEMORY_SOURCE
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.plan.step_time import BEYOND_TWO_GPUS, step_time
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


def _measure(corpus: Path, output: Path, *overrides: str) -> list[dict[str, Any]]:
    me = launched_rank()
    place = planner_points.Place(me, choose_platform(me), H200, corpus, (*TINY, *overrides))
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


def test_a_step_takes_its_whole_batch(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if fewer samples run than are counted as tokens, as they would with the share of another micro-batch."""
    write_corpus(tmp_path, VOCAB)
    losses = []
    for size in (1, 2):
        sizes = ("train.global_batch_size=4", f"train.micro_batch_size={size}")
        (records,) = ranks.run(_measure, 1, tmp_path, tmp_path / f"{size}.jsonl", *sizes)
        losses.append(records[0]["losses"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.parametrize("name", planner_points.POINTS)
def test_every_point_is_a_run_of_its_number_of_gpus(name: str, tmp_path: Path) -> None:
    """Fails if a point is refused, or its own settings do not reach the run."""
    point = planner_points.POINTS[name]
    plan = plan_run(planner_points.configure(point, tmp_path, ()), point.gpus)
    config, parts = plan.config, name.split("_")
    gpus = {"slice": 1, "whole": 2, "whole4": 4, "shared2": 2, "shared4": 4}
    assert plan.layout.tensor == point.gpus == gpus[parts[0]]
    assert config.precision.format.value in name
    assert f"{config.train.seq_length // 1024}k" in parts
    assert config.parallel.overlap_tensor_comm == (parts[-1] == "overlap")
    assert config.train.cuda_graphs == (parts[-1] == "graphs")
    assert config.train.recompute.value == (parts[-1] if parts[-1] in ("full", "selective") else "none")


# By the command itself on H200s (2026-11-27; shared and whole4 2026-11-28; torch 2.11), but for the times of
# shared4_bf16_8k and shared4_fp8_block_8k between the first and the last, and the first with graphs, which are of a
# script that took the same steps: peak in GiB, and how near it is planned; milliseconds of a step in up to four runs.
# Why full recomputation is planned 3 % too large, and what the 12B and four ranks in fp8_block hold beside, is not
# known.
MEASURED = {
    "slice_bf16_8k": (94.44, 0.005, [356.5, 361.9, 357.7, 362.2]),
    "slice_fp8_block_8k": (97.83, 0.005, [301.9, 309.3, 300.8, 308.5]),
    "slice_fp8_block_16k": (112.33, 0.005, [561.9, 575.5, 552.8]),
    "slice_fp8_block_4k": (90.58, 0.005, [181.8, 194.1, 193.3, 184.4]),
    "slice_fp8_block_8k_selective": (95.41, 0.005, [310.9, 318.5, 311.3]),
    "slice_fp8_block_16k_full": (87.65, 0.035, [679.9, 697.6, 678.2]),
    "slice_fp8_current_8k": (97.74, 0.005, [276.5, 282.2, 277.7]),
    "whole_fp8_block_8k": (92.76, 0.025, [1026.8]),
    "whole_bf16_8k_full": (108.00, 0.005, [1502.6]),
    "whole4_fp8_block_8k": (46.18, 0.02, [951.7]),
    "whole4_fp8_block_8k_graphs": (46.53, 0.03, [587.0]),
    "shared2_bf16_8k": (47.41, 0.005, [745.4]),
    "shared2_bf16_8k_overlap": (47.51, 0.01, [725.5]),
    "shared2_fp8_current_8k": (49.17, 0.01, [616.2]),
    "shared2_fp8_current_8k_overlap": (49.17, 0.01, [563.0]),
    "shared4_bf16_8k": (23.75, 0.01, [416.5, 409.1, 415.9]),
    "shared4_bf16_8k_overlap": (23.85, 0.015, [401.9]),
    "shared4_fp8_block_8k": (25.38, 0.04, [684.4, 509.8, 522.9, 488.8]),
    "shared4_fp8_block_8k_graphs": (25.11, 0.04, [339.0, 343.1]),
    "shared4_fp8_current_8k": (24.66, 0.015, [622.9]),
    "shared4_fp8_current_8k_overlap": (24.68, 0.015, [605.8]),
}


# What is known to be planned wrong: measured time, by planned, least and most. Overlap the planner leaves out. In FP8
# four ranks wait for the CPU, which starts more kernels for a split layer than the planner knows of. Where they do not
# wait, some of their exchanges and other kernels run side by side, and the planner adds them up.
MISSED = {
    "whole4_fp8_block_8k": (1.238, 1.238),
    "whole4_fp8_block_8k_graphs": (0.943, 0.943),
    "shared4_bf16_8k": (0.931, 0.947),
    "shared4_bf16_8k_overlap": (0.914, 0.914),
    "shared4_fp8_block_8k": (1.029, 1.441),
    "shared4_fp8_block_8k_graphs": (0.882, 0.893),
    "shared4_fp8_current_8k": (1.351, 1.351),
    "shared4_fp8_current_8k_overlap": (1.314, 1.314),
}


@pytest.mark.parametrize("name", planner_points.POINTS)
def test_a_point_is_planned_as_it_was_measured(name: str, tmp_path: Path) -> None:
    """Fails if what a layer keeps, a copy of the weights, the moments or the logits are forgotten or counted twice; if
    a layer, the output layer, the optimizer, what full recomputation computes again or the traffic of two GPUs takes
    another time; and if the planner learns what it is known to miss, which then has to go from `MISSED` and from what
    the planner says of itself. No time of a step is in the table."""
    point, (measured_gib, near, measured_ms) = planner_points.POINTS[name], MEASURED[name]
    plan = plan_run(planner_points.configure(point, tmp_path, ()), point.gpus)
    assert memory_gib_per_gpu(plan_memory(plan)) == pytest.approx(measured_gib, rel=near)
    planned_ms = 1e3 * step_time(plan, plan.batches.segments[0], H200).total
    if name in MISSED:
        least, most = MISSED[name]
        assert min(measured_ms) / planned_ms == pytest.approx(least, abs=0.02)
        assert max(measured_ms) / planned_ms == pytest.approx(most, abs=0.02)
        return
    assert planned_ms == pytest.approx(min(measured_ms), rel=0.07)
    assert planned_ms == pytest.approx(max(measured_ms), rel=0.07)


def test_the_planner_says_what_it_misses() -> None:
    """Fails if the notes under a plan have other figures than the comparison."""
    furthest = max(near for _, near, _ in MEASURED.values())
    assert f"within {furthest:.0%} of {len(MEASURED)} peaks".replace("%", " %") in MEMORY_SOURCE
    graphs, fp8 = list[float](), list[float]()
    for name, ratios in MISSED.items():
        if "fp8" in name and not name.endswith("overlap"):
            (graphs if name.endswith("graphs") else fp8).extend(ratios)
    for ratios in (MISSED["shared4_bf16_8k"], fp8, graphs):
        assert f"{min(ratios):.2f} to {max(ratios):.2f}" in BEYOND_TWO_GPUS
