"""The probe's measurements on the CPU with a tiny model, and a table's way from there into the planner's answer."""

import copy
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_train.engine.groups import process_groups
from nemotron_train.errors import EXIT_FAILED, ConfigError
from nemotron_train.plan.__main__ import main as plan_main
from nemotron_train.plan.gpu_table import FORMATS, SHAPE, gpu_from, read_gpu
from nemotron_train.plan.measured import H200
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.probe import __main__ as command
from nemotron_train.probe import one_gpu, two_gpus
from nemotron_train.probe.chunks import Bench, build_chunk, layer_ms, probed_config
from nemotron_train.probe.table import SHIPPED, enter_all, measure_one_gpu, note_two_gpus, write_table
from tests.ranks import RankPool

TINY = (
    "model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.attention_head_dim=16", "model.mamba_num_heads=16", "model.mamba_head_dim=8", "model.mamba_num_groups=2",
    "model.mamba_state_dim=16", "model.mamba_chunk_size=32", "model.vocab_size=512", "train.seq_length=128",
)  # fmt: skip
CAN_BE_ZERO = ("tensor_parallel_ms", "first_pass_ps_per_weight")
SHARE_OF_PARTS = 1.5  # what a layer takes of its parts at least, in the table that the planner reads


def bench_on_this_rank(work: Any, *overrides: str) -> Any:
    """Return what `work` makes of a bench with a tiny model."""
    me = launched_rank()
    platform, config = choose_platform(me), probed_config(*TINY, *overrides)
    with process_groups(plan_run(config, me.world_size).layout, platform, me, timeout_seconds=60, seed=1) as groups:
        return work(Bench(config, platform, groups, repeats=1))


def _measure_one() -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    return bench_on_this_rank(lambda bench: measure_one_gpu(bench, told.append)), told


def mend(table: dict[str, Any]) -> dict[str, Any]:
    """A layer of a few microseconds on a busy machine may seem to take less than its parts: such a table is refused.
    And on a CPU, starting a layer is all of its work."""
    table = copy.deepcopy(table)
    for by_format in table["launch_ms"].values():
        by_format |= {name: [0.0, 0.0] for name in by_format}
    for kind, by_format in table["layer_ms"].items():
        parts = table["core_ms"].get(kind, 0.0) + table["norm_and_residual_ms"]
        table["layer_ms"][kind] = {name: max(ms, SHARE_OF_PARTS * parts) for name, ms in by_format.items()}
    return table


@functools.cache
def _probed(pool: RankPool) -> tuple[dict[str, Any], list[str]]:
    (result,) = pool.run(_measure_one, 1)
    return result


def numbers(tree: Any) -> Iterator[float]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, list):
            yield from value
        elif isinstance(value, int | float):
            yield value


def test_a_probe_fills_a_table(ranks: RankPool) -> None:
    """Fails if a measurement does not run on the real layers, or its result is not where the planner looks."""
    table, told = _probed(ranks)
    assert len(told) == len(set(told)) == command.MEASUREMENTS_OF_ONE
    never_zero = {key: value for key, value in table.items() if key not in CAN_BE_ZERO}
    assert all(math.isfinite(number) and number > 0 for number in numbers(never_zero))
    for kind in LayerKind:
        assert list(table["layer_ms"][kind.name]) == [format.value for format in FORMATS]
    assert not any("not measured" in note for key, note in table["notes"].items() if note != SHIPPED), table["notes"]
    assert table["model"]["hidden_size"] == 64
    assert table["tokens"] == 128
    gpu = gpu_from(mend(table), Path("probed.json"), "a table")
    assert set(table["first_pass_ps_per_weight"]) == {"fp8_block", "fp8_current"}
    assert gpu.head_ms == table["head_ms"]
    assert "shipped" in gpu.source


def _plan(table: dict[str, Any], file: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    write_table(table, file)
    model = [each for each in TINY if not each.startswith("train.")]
    run = ["experiment=own_text", "precision=bf16", "model.layer_pattern=M-*-", "train.seq_length=128", *model]
    run += ["train.global_batch_size=2", "train.micro_batch_size=1"]
    assert plan_main([*run, f"gpu={file}", "format=json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_planner_answers_by_the_table(ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a number of a table does not reach the answer, or not in proportion."""
    table, file = mend(_probed(ranks)[0]), tmp_path / "probed.json"
    before = _plan(table, file, capsys)
    layers = {kind: table["layer_ms"][kind]["bf16"] for kind in ("mamba", "mlp", "attention")}
    expected = layers["mamba"] + 2 * layers["mlp"] + layers["attention"] + table["head_ms"]
    assert before["step_seconds_by_part"]["layers"] == pytest.approx(2e-3 * expected)  # two micro-batches
    assert before["memory_gib_of_gpu"] == table["memory_gib"]
    assert f"the table {file} (CPU, {table['date']})" in before["times_from"]

    slower = copy.deepcopy(table)
    slower["layer_ms"]["mlp"]["bf16"] *= 2
    after = _plan(slower, file, capsys)
    more = after["step_seconds_by_part"]["layers"] - before["step_seconds_by_part"]["layers"]
    assert more == pytest.approx(2e-3 * 2 * layers["mlp"])
    slower["optimizer_ps_per_parameter"] *= 3
    slowest, slow = (each["step_seconds_by_part"]["optimizer"] for each in (_plan(slower, file, capsys), after))
    assert slowest == pytest.approx(3 * slow)


def test_what_the_cpu_takes_to_start_a_layer_reaches_the_answer(
    ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if forward and backward are mixed up, or the planner does not read them."""
    table = mend(_probed(ranks)[0])
    table["launch_ms"]["mlp"]["bf16"] = [1e6, 0.0]
    mlp = table["layer_ms"]["mlp"]["bf16"]
    before, after = (_plan(each, tmp_path / "probed.json", capsys) for each in (mend(table), table))
    more = after["step_seconds_by_part"]["layers"] - before["step_seconds_by_part"]["layers"]
    assert more == pytest.approx(2e-3 * 2 * (1e6 - mlp / 3))
    assert gpu_from(table, Path("probed.json"), "a table").launch_ms[LayerKind.mlp][FORMATS[0]] == (1e6, 0.0)


def test_a_table_that_is_refused_is_there_to_be_mended(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if minutes of measuring are lost because one of their results cannot be right."""
    table, file = mend(_probed(ranks)[0]), tmp_path / "probed.json"
    table["layer_ms"]["mlp"]["bf16"] = table["norm_and_residual_ms"] / 2
    with pytest.raises(ConfigError, match=r"layer_ms\.mlp\.bf16"):
        write_table(table, file)
    assert json.loads(file.read_text()) == table


def _measure_two() -> tuple[dict[str, Any], float]:
    def work(bench: Bench) -> tuple[dict[str, Any], float]:
        table: dict[str, Any] = {
            "layer_ms": {"mlp": {"bf16": 1.0}},
            "tensor_parallel_ms": {},
            "notes": {},
            "summary": "",
        }
        # With layers that take no time by the table, all that a split layer takes is beyond it.
        instant = {kind: {format: 1e-9 for format in FORMATS} for kind in LayerKind}
        at_once = {kind: dict.fromkeys(FORMATS, (0.0, 0.0)) for kind in LayerKind}
        gpu = replace(H200, layer_ms=instant, core_ms=dict.fromkeys(LayerKind, 0.0), norm_and_residual_ms=0.0)
        gpu = replace(gpu, launch_ms=at_once)
        enter_all(table, two_gpus.measurements(bench, table, lambda tree: gpu), lambda key: None)
        note_two_gpus(table)
        return table, layer_ms(bench, LayerKind.mlp, FORMATS[0])

    return bench_on_this_rank(work, "parallel=tensor_2")


def test_two_ranks_tell_what_splitting_costs_and_how_fast_they_reach_each_other(ranks: RankPool) -> None:
    """Fails if the split layers do not run, or what they take does not reach the table."""
    for table, mlp_ms in ranks.run(_measure_two, 2):
        assert list(table["tensor_parallel_ms"]) == ["bf16"]
        assert table["tensor_parallel_ms"]["bf16"] > 0
        assert table["node_gb_per_s"] > 0
        assert mlp_ms > 0
        assert "two" in table["summary"]


def _gradients_after(passes: int) -> float:
    def work(bench: Bench) -> float:
        bench = bench.with_layers("-", FORMATS[0])
        chunk = build_chunk(bench, (LayerKind.mlp,), has_ends=False)
        x = torch.ones(128, 1, 64, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(passes):
            chunk.module.set_input_tensor(x)
            with chunk.no_sync():
                chunk(None).backward(torch.ones_like(x))
        return float(chunk.buffers[0].grad_data.double().norm())

    return bench_on_this_rank(work)


def test_gradients_are_accumulated_while_layers_are_measured(ranks: RankPool) -> None:
    """Fails if a probed layer's weight gradients do not go into the gradient buffers, which training would pay for."""
    (once,), (twice,) = ranks.run(_gradients_after, 1, 1), ranks.run(_gradients_after, 1, 2)
    assert once > 0
    assert twice == pytest.approx(2 * once, rel=1e-3)


def test_an_fp8_format_that_is_refused_is_left_out_with_the_reason() -> None:
    """Fails if a GPU without FP8 cannot be probed, or another failure is passed over."""

    def refuse() -> float:
        raise AssertionError("Device compute capability 8.9 or higher required for FP8 execution.")

    table: dict[str, Any] = {"notes": {}}
    fine = ("layer_ms.mlp.bf16", lambda: 2.0)
    enter_all(table, [fine, ("layer_ms.mlp.fp8_block", refuse)], lambda key: None)
    assert table["layer_ms"] == {"mlp": {"bf16": 2.0}}
    assert "8.9 or higher" in table["notes"]["layer_ms.mlp.fp8_block"]
    with pytest.raises(AssertionError):
        enter_all(table, [("layer_ms.mlp.bf16", refuse)], lambda key: None)


def test_every_measurement_of_the_real_model_is_of_the_shipped_tables_shape() -> None:
    """Fails if tables of two machines would not be about the same layers."""
    config = probed_config()
    assert {name: getattr(config.model, name) for name in SHAPE} == {name: getattr(H200.model, name) for name in SHAPE}
    assert config.train.seq_length == H200.tokens
    assert sum(1 for _ in one_gpu.measurements(None)) == command.MEASUREMENTS_OF_ONE  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to probe")
def test_a_machine_without_gpu_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fails if the probe measures a CPU, or ends in a traceback."""
    assert plan_main(["--probe", str(tmp_path / "gpu.json")]) == EXIT_FAILED
    error = capfd.readouterr().err
    assert "torch finds none here" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def shipped() -> dict[str, Any]:
    file = Path(__file__).parents[2] / "nemotron_train" / "plan" / "tables" / "h200.json"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("layer_ms.mlp.bf16", None, "layer_ms.mlp.bf16 is missing"),
        ("head_ms", "58", 'head_ms is "58", expected a number'),
        ("head_ms", True, "head_ms is true"),
        ("core_ms.mamba", -1.0, "core_ms.mamba is -1.0, expected more than 0"),
        ("norm_and_residual_ms", float("nan"), "norm_and_residual_ms is NaN"),
        ("layer_ms.attention.fp8_block", 5.1, "layer_ms.attention.fp8_block is 5.1, no more than its parts"),
        ("launch_ms.mlp.bf16", 1.0, "launch_ms.mlp.bf16 is 1.0, expected two numbers"),
        ("launch_ms.mlp.bf16", [1.0, -2.0], "launch_ms.mlp.bf16, backward, is -2.0, expected 0 or more"),
        ("launch_ms.mamba.fp8_block", None, "launch_ms.mamba.fp8_block is missing"),
        ("first_pass_ps_per_weight.fp8_block", None, "first_pass_ps_per_weight.fp8_block is missing"),
        ("tensor_parallel_ms.fp4", 1.0, "tensor_parallel_ms.fp4 is none of the formats"),
        ("tensor_parallel_ms.fp8_block", None, "tensor_parallel_ms.fp8_block is missing"),
        ("model.hidden_size", 51.2, "model.hidden_size=51.2 is a number, expected whole number"),
        ("model.vocab_size", 0, "model.vocab_size is 0"),
        ("date", 2026, "date is 2026, expected text"),
        ("memory_bandwidth", 4.8, "memory_bandwidth is not a key of a table"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(path: str, value: Any, expected: str, tmp_path: Path) -> None:
    """Fails if a wrong table is planned by, or the refusal does not name file and key."""
    table, file = shipped(), tmp_path / "mine.json"
    *sections, last = path.split(".")
    section = functools.reduce(lambda tree, name: tree[name], sections, table)
    if value is None:
        del section[last]
    else:
        section[last] = value
    file.write_text(json.dumps(table))
    with pytest.raises(ConfigError) as refused:
        read_gpu(file, "a table")
    assert f"The table {file}" in str(refused.value)
    assert expected in str(refused.value)


def test_a_format_without_times_is_refused_and_the_others_are_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a table of a card without an FP8 format cannot be used, or is used for that format."""
    table, file = shipped(), tmp_path / "mine.json"
    for by_format in table["layer_ms"].values():
        del by_format["fp8_block"]
    write_table(table, file)
    run = ["experiment=nemotron_nano_12b_v2", "world_size=4", f"gpu={file}"]
    assert plan_main([*run, "precision=bf16"]) == 0
    assert f"from the table {file}" in capsys.readouterr().out
    assert plan_main(run) == EXIT_FAILED
    assert "No times in fp8_block" in capsys.readouterr().err
