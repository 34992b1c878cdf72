"""`python -m nemotron_train.plan`: what it prints, that it needs no torch, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_train.config.load import list_choices
from nemotron_train.errors import EXIT_FAILED
from nemotron_train.plan.__main__ import main

NANO_12B = [
    "experiment=quickstart", "model=nemotron_nano_12b_v2", "parallel=tensor_8", "train=pretrain_8k", "world_size=5888",
    "train.global_batch_size=736", "train.train_tokens=20_000_000_000_000", "train.eval_tokens=8192",
    "lr.peak=4.5e-4", "lr.min=4.5e-6", "lr.warmup_tokens=8_000_000_000", "lr.decay_tokens=3_600_000_000_000",
]  # fmt: skip


def test_json_has_the_numbers_of_the_published_12b_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the plan of Nano 12B v2's run is not the published one: 12.31B parameters, 6,029,312 tokens a step,
    and 1.45e24 FLOPs as its model card states."""
    assert main([*NANO_12B, "format=json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 12_310_001_152
    assert sum(plan["parameters_by_part"].values()) == plan["parameters"]
    assert plan["tokens_per_step"] == 6_029_312
    assert plan["num_steps"] == 3_317_128
    assert plan["train_flops"] == pytest.approx(1.45e24, rel=0.01)
    assert plan["train_flops"] == plan["flops_per_token"] * plan["num_steps"] * plan["tokens_per_step"]
    assert (plan["data_parallel_size"], plan["micro_batches"]) == (736, 1)
    assert plan["learning_rate_at_end"] == pytest.approx(4.5e-6, rel=1e-2)


def test_text_tells_model_layout_steps_rate_and_phases(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the banner of a run loses one of its facts."""
    arguments = [
        "experiment=quickstart",
        "parallel=tensor_2_pipeline_2",
        "world_size=8",
        "train.train_tokens=1_000_000",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for fact in (
        "4 mamba, 2 attention, 4 mlp", "1,619,936", "8 = tensor 2 with sequence parallelism", "pipeline 2 x data 2",
        "rank 1:", "4,096 tokens", "244, 999,424 of 1,000,000", "wsd: 0 to 0.004 over 81,920 tokens", "(minus_sqrt)",
        "code 40.0%, tests 35.0%", "(not reached)",
    ):  # fmt: skip
        assert fact in out


def test_text_tells_what_is_exchanged_while_products_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the banner keeps the option to itself, its buffers are counted among what torch counts, or the time is
    told as if all it hides were counted."""
    run = ["experiment=nemotron_nano_12b_v2", "precision=fp8_current", "world_size=4", "train.global_batch_size=4"]
    assert main([*run, "parallel.overlap_tensor_comm=true"]) == 0
    out = capsys.readouterr().out
    assert "with sequence parallelism, exchanged while products run" in out
    assert "about 4.56 outside torch" in out
    assert "user buffers" not in out
    assert "not counted: the traffic that parallel.overlap_tensor_comm hides" in out


def test_text_tells_of_cuda_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if nobody is told that a graph would help, where it would not, what it takes, or that it is there."""
    run = ["experiment=nemotron_nano_12b_v2", "world_size=4", "train.global_batch_size=4"]
    hint = "a step of train.cuda_graphs=true is planned"
    assert main(run) == 0
    assert hint in capsys.readouterr().out
    assert main([*run, "parallel=data_only"]) == 0
    assert hint not in capsys.readouterr().out  # the GPU has enough to do
    assert main([*run, "parallel.overlap_param_gather=true"]) == 0
    assert hint not in capsys.readouterr().out  # refused
    assert main([*run, "train.cuda_graphs=true"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    grow = "not counted: the graphs themselves, which grow with layers"
    assert hint not in out
    for fact in ("started as CUDA graphs", "beside the CUDA graphs", grow):
        assert fact in out
    assert f"{grow} and micro-batches" not in out
    assert main([*run, "train.cuda_graphs=true", "parallel.pipeline_parallel_size=2", "world_size=8"]) == 0
    assert f"{grow} and micro-batches" in " ".join(capsys.readouterr().out.split())


def test_text_tells_the_parts_of_a_gpt(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the banner keeps a part of the model to itself, or the time is told as if all of it were counted."""
    changes = ["model.qkv_norm=qk", "model.attention_logit_cap=50"]
    assert main(["experiment=stability_830m", "world_size=8", *changes]) == 0
    out = capsys.readouterr().out
    parts = "norm layer, linear_bias True, position_embedding learned, max_position_embeddings 4096, qkv_norm qk"
    for fact in (parts, "attention_logit_cap 50.0", "positions 4.194M", "not counted: what", "not fused"):
        assert fact in out
    assert main(["experiment=nemotron_nano_12b_v2", "world_size=4", "train.global_batch_size=1"]) == 0
    assert "not counted" not in capsys.readouterr().out


def test_text_tells_of_no_scan_where_nothing_is_scanned(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if context-parallel ranks of a model without Mamba layers are said to scan heads of its unread keys."""
    assert main(["experiment=stability_830m", "parallel.context_parallel_size=2", "world_size=2"]) == 0
    out = capsys.readouterr().out
    assert "every rank has 2 runs of 1,024 of the 4,096 tokens of a sample\n" in out
    assert "Mamba heads" not in out


def test_the_banner_is_of_the_first_samples(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a token's compute, or the tokens of a product, go by train.seq_length where the first phase has another.
    By hand: attention adds 6 layers x 6 FLOPs x 40 heads x 128 channels to a token for each token of a sample more."""
    flops = {}
    for length in (8192, 32768):
        phase = f"data.phases=[{{start_tokens: 0, seq_length: {length}, weights: [{{source: text, weight: 1}}]}}]"
        run = ["experiment=nemotron_nano_12b_v2", "data=single_source", "data.path=corpus", phase, "world_size=736"]
        assert main(run) == 0
        out = capsys.readouterr().out
        assert f"{length:,} tokens x 5,120 x " in out
        assert main([*run, "format=json"]) == 0
        flops[length] = json.loads(capsys.readouterr().out)["flops_per_token"]
        assert f"compute    {flops[length] / 1e9:.4g} GFLOP a token" in out
    assert flops[32768] - flops[8192] == (32768 - 8192) * 6 * 6 * 40 * 128


def test_the_long_context_layout_of_the_12b_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if 512k tokens on tensor 8 x context 16 cannot be planned, or context-parallel ranks count as replicas."""
    long = ["parallel.context_parallel_size=16", "train.seq_length=524_288", "train.global_batch_size=92"]
    arguments = [*NANO_12B, *long, "train.eval_tokens=524_288"]
    assert main([*arguments, "format=json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["context_parallel_size"], plan["data_parallel_size"], plan["micro_batches"]) == (16, 46, 2)
    assert plan["tokens_per_step"] == 92 * 524_288
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for fact in ("context 16", "2 runs of 16,384 of the 524,288 tokens", "for 1 of the 128 Mamba heads"):
        assert fact in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["experiment=quickstart", "parallel=tensor_2", "world_size=5"], "5 ranks"),
        (["experiment=quickstart", "world_size=two"], "world_size=two"),
        (["experiment=quickstart", "format=yaml"], "format=yaml"),
        (["experiment=quickstart", "gpu=b200"], "gpu=b200 is not one of h200, h100"),
        (["experiment=quickstart", "price_per_gpu_hour=cheap"], "price_per_gpu_hour=cheap"),
        (["experiment=quickstart", "price_per_gpu_hour=-1"], "price_per_gpu_hour=-1"),
        (["experiment=quickstart", "--search", "--png", "x.png"], "png would have no effect on search"),
        (["experiment=quickstart", "--search", "--explain", "lr.peak"], "search would have no effect on explain"),
        (["experiment=quickstart", "--explain", "lr.peak", "format=json"], "format would have no effect on explain"),
        (["experiment=quickstart", "--explain"], "--explain needs a value"),
        (["experiment=quickstart", "--explain", "lr.peek"], "Did you mean lr.peak?"),
        (["experiment=quickstart", "--search"], "fp32 has no measured times"),
        (["experiment=quickstart", "train.train_token=5"], "train.train_tokens"),
        ([], "experiment=NAME"),
    ],
)
def test_what_is_wrong_goes_to_stderr_with_an_exit_code(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a mistake ends in a traceback, or with success."""
    assert main(arguments) == EXIT_FAILED
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["--search"], ["--explain", "train.recompute"], ["format=json"]])
def test_planning_loads_neither_torch_nor_megatron(arguments: list[str]) -> None:
    """Fails if anything below config/ or plan/ starts to import what a laptop may not have (and seconds of
    start-up)."""
    code = (
        "import sys; from nemotron_train.plan.__main__ import main; "
        f"assert main(['experiment=nemotron_nano_12b_v2', 'world_size=4', *{arguments}]) == 0; "
        "print(sorted({'torch', 'megatron', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("experiment", list_choices("experiment"))
def test_every_experiment_can_be_planned(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if an experiment is refused on as many ranks as hold its model once, data that is not there included."""
    assert main([f"experiment={experiment}", "format=json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory_gib_per_gpu"] > 0
    assert plan["num_steps"] > 0


def test_json_has_memory_time_and_products(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a number that programs read is renamed, or does not fit the others."""
    arguments = ["experiment=nemotron_nano_12b_v2", "world_size=736", "price_per_gpu_hour=2", "format=json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["bf16_gemms"]) == 8
    assert plan["memory_gib_per_gpu"] == max(rank["peak"] for rank in plan["memory_by_pipeline_rank"])
    assert plan["fits"] is True
    seconds = plan["num_steps"] * plan["step_seconds"]
    assert plan["days"] == pytest.approx(seconds / 86_400)
    assert plan["gpu_hours"] == pytest.approx(seconds / 3600 * 736)
    assert plan["price"] == pytest.approx(2 * plan["gpu_hours"])
    rate = plan["tokens_per_step"] / plan["step_seconds"] / 736
    assert plan["tokens_per_second_per_gpu"] == pytest.approx(rate)
    assert sum(plan["step_seconds_by_part"].values()) == pytest.approx(plan["step_seconds"])
    assert [phase["first_step"] for phase in plan["phases"]] == [0, 1_990_277, 2_985_416]
    assert plan["checkpoint_bytes"] == 14 * plan["parameters"]


def test_text_tells_memory_time_cost_groups_and_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the answer to a question that is asked before a job starts is left out, or passes for measured."""
    pipeline = ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2"]
    assert main(["experiment=nemotron_nano_12b_v2", "world_size=32", "gpu=h100", *pipeline]) == 0
    out = capsys.readouterr().out
    for fact in (
        "tensor 0, 1, 2, 3;", "data 0, 4, 8, 12, across nodes", "pipeline 0, 16, across nodes", "step 1,990,277 (0.6",
        "H100's 79.6 GiB", "the peak of each:", "tokens/s and", "bubble", "days of training alone",
        "price_per_gpu_hour=X", "derived, nothing measured", "172.3 GB, of it 24.62 GB weights",
    ):  # fmt: skip
        assert fact in out, fact


def test_a_picture_is_written_beside_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if `--png` writes no picture, or a folder that is not there ends in a traceback."""
    assert main(["experiment=nemotron_h_56b", "--png", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert main(["experiment=nemotron_h_56b", f"--png={tmp_path}/missing/run.png"]) == EXIT_FAILED
    assert "missing/run.png cannot be written" in capsys.readouterr().err
