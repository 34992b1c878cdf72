"""Does a run whose FP8 layers hold their weights in FP8 only learn what one with bfloat16 weights does, and do their
checkpoints look the same?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_train.checkpoint.fp8_weights import lives_in_fp8
from nemotron_train.checkpoint.resume import checkpoints_folder
from nemotron_train.checkpoint.store import load_checkpoint
from nemotron_train.checkpoint.whole_weights import read_whole_weights
from nemotron_train.config.schema import PrecisionFormat, PrimaryWeights, RunConfig, StateFormat
from nemotron_train.engine.optimizer import take_step
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.runtime import Runtime
from nemotron_train.step import run_all
from nemotron_train.trainer import build_runtime
from tests.engine.live import live_groups, live_run, micro_batches, random_samples
from tests.ranks import RankPool
from tests.run.test_gpu_runs import SIZES
from tests.small_runs import logged, small_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

STEPS, STOP = 30, 15
FORMATS = ("fp8_block", "fp8_current")
# Both quantise the master weight rounded to bfloat16; what is left is the order of sums on a GPU.
CLOSE = 5e-3


def config_of(
    corpus: Path, run_dir: Path, format: str, primary: str, *, parallel: dict[str, Any] | None = None, **optim: Any
) -> RunConfig:
    """30 steps of 8 samples of 128 tokens; the first of five layers stays in bfloat16. 32 heads, so that half of
    them, too, have sizes that FP8 multiplies."""
    return small_config(
        corpus,
        run_dir,
        steps=4 * STEPS,
        model={**SIZES, "mamba_num_heads": 32},
        parallel=parallel or {},
        precision={
            "format": PrecisionFormat(format),
            "bf16_first_layers": 1,
            "primary_weights": PrimaryWeights(primary),
        },
        train={"seq_length": 128, "eval_every_steps": 10},
        optim=optim,
        checkpoint={"allow_change": ["precision.primary_weights"]},
    )


def curve(ranks: RankPool, config: RunConfig, world_size: int = 1, stop: int | None = None) -> list[float]:
    return logged("loss", ranks.run(train, world_size, config, stop)[0])


def masters(run: Runtime) -> dict[str, torch.Tensor]:
    return {name: weight.main_param.clone() for name, weight in run.chunks[0].module.named_parameters()
            if weight.dtype is torch.bfloat16}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_weights_live_in_fp8_and_start_as_others_do(corpus: Path, tmp_path: Path, format: str) -> None:
    """Fails if a layer keeps a bfloat16 weight, one that stays in bfloat16 does not, or master weights start from what
    FP8 has rounded."""
    config, plain = (config_of(corpus, tmp_path, format, primary) for primary in ("fp8", "bf16"))
    with live_groups(config) as (platform, groups):
        run = build_runtime(plan_run(config, 1), platform, groups)
        weights = dict(run.chunks[0].module.named_parameters())
        listed = {f"{gemm.name}.weight": gemm.in_fp8 for gemm in run.plan.gemms}
        assert {name: lives_in_fp8(weights[name]) for name in listed} == listed
        assert any(listed.values())
        assert not all(listed.values())
        assert not any(lives_in_fp8(weight) for name, weight in weights.items() if name not in listed)
        expected = masters(build_runtime(plan_run(plain, 1), platform, groups))
        for name, master in masters(run).items():
            assert torch.equal(master, expected[name]), name
            held = weights[name].dequantize() if lives_in_fp8(weights[name]) else weights[name]
            error = (held.float().flatten() - master).norm() / master.norm()
            assert error < 0.05, (name, error)  # E4M3 has 4 significant bits: 0.026 of what is spread evenly
        assert not any(getattr(weight, "_high_precision_init_val", None) is not None for weight in weights.values())


@pytest.mark.parametrize("format", FORMATS)
def test_an_update_stores_what_quantising_the_master_weight_gives(corpus: Path, tmp_path: Path, format: str) -> None:
    """Fails if the update leaves a copy, by rows or by columns, behind, or scales are not those of a BF16 weight: then
    runs with the two kinds of weights drift apart, and a resumed run is not the run that stopped."""
    config = config_of(corpus, tmp_path, format, "fp8")
    with live_run(config) as run:
        run_all(run, micro_batches(random_samples(0, 8, config), 2), forward_only=False)
        for part in run.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                group["lr"] = 1e-2
        assert take_step(run.optimizer).updated
        for name, weight in run.chunks[0].module.named_parameters():
            if lives_in_fp8(weight):
                rounded = weight.main_param.to(torch.bfloat16).view(weight.shape)
                again = weight._get_quantizer().copy()
                again.set_usage(rowwise=True, columnwise=True)
                for (what, found), (_, wanted) in zip(data_of(weight), data_of(again(rounded)), strict=True):
                    assert torch.equal(found, wanted), (name, what)


def data_of(weight: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield bytes and scales, but for what pads the scales."""
    rows, columns = weight.shape
    if hasattr(weight, "_rowwise_data"):
        across, down = -(-columns // 128), -(-rows // 128)
        yield "rows", weight._rowwise_data
        yield "columns", weight._columnwise_data
        yield "scales of rows", weight._rowwise_scale_inv[:down, :across]
        yield "scales of columns", weight._columnwise_scale_inv[:across, :down]
    else:
        yield "data", weight._data
        yield "transpose", weight._transpose
        yield "scale", weight._scale_inv


@pytest.mark.parametrize("format", FORMATS)
def test_the_loss_is_that_of_bf16_weights(ranks: RankPool, corpus: Path, tmp_path: Path, format: str) -> None:
    """Fails if an update does not reach the FP8 weights, their scales or their copies by columns, also after an
    evaluation."""
    curves = [curve(ranks, config_of(corpus, tmp_path / primary, format, primary)) for primary in ("bf16", "fp8")]
    print(format, max(abs(a - b) / a for a, b in zip(*curves, strict=True)))
    assert len(curves[0]) == STEPS
    assert curves[1] == pytest.approx(curves[0], rel=CLOSE)


def test_state_in_bf16_goes_with_fp8_weights(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Fails if Megatron-Core still takes master weights for what bfloat16 weights lack."""
    low = {"gradients": StateFormat.bf16, "moments": StateFormat.bf16}
    curves = [
        curve(ranks, config_of(corpus, tmp_path / primary, "fp8_block", primary, **low)) for primary in ("bf16", "fp8")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp8"), ("fp8", "bf16"), ("fp8", "fp8")])
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_goes_on_with_either(
    ranks: RankPool, corpus: Path, tmp_path: Path, format: str, first: str, second: str
) -> None:
    """Fails if a checkpoint tells what its writer held, or loses precision to FP8."""
    straight = curve(ranks, config_of(corpus, tmp_path / "straight", format, "bf16"))
    curve(ranks, config_of(corpus, tmp_path / "run", format, first), stop=STOP)
    ranks.run(check_stored_weights, 1, config_of(corpus, tmp_path / "run", format, second))
    crossed = curve(ranks, config_of(corpus, tmp_path / "run", format, second))
    assert crossed == pytest.approx(straight, rel=CLOSE)


def check_stored_weights(config: RunConfig) -> None:
    """What is stored is the rounded master weight, and what is loaded of it is what FP8 makes of that."""
    (folder,) = checkpoints_folder(config).glob("step_*")
    stored = read_whole_weights(folder)
    with live_run(config) as run:
        load_checkpoint(run, folder, lambda commit: None)
        for name, weight in run.chunks[0].module.named_parameters():
            if weight.dtype is torch.bfloat16:
                assert stored[name].dtype is torch.bfloat16
                master = weight.main_param.to(torch.bfloat16).view(weight.shape)
                assert torch.equal(stored[name].cuda(), master), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_two_gpus_gather_fp8_weights(ranks: RankPool, corpus: Path, tmp_path: Path, format: str, overlap: bool) -> None:
    """Fails if a rank's shard of bytes lands elsewhere, scales are not those of whole blocks, or a copy by columns is
    not made anew after a gather, those before an evaluation included. A run stopped on two GPUs goes on on one."""
    alone = curve(ranks, config_of(corpus, tmp_path / "alone", format, "bf16"))
    parallel = {"overlap_param_gather": overlap}
    two = config_of(corpus, tmp_path / "two", format, "fp8", parallel=parallel)
    together = curve(ranks, two, 2, stop=STOP)
    assert together == pytest.approx(alone[:STOP], rel=1e-2)
    together = curve(ranks, config_of(corpus, tmp_path / "two", format, "fp8"))
    assert together == pytest.approx(alone, rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("format", FORMATS)
def test_two_gpus_share_fp8_layers(ranks: RankPool, corpus: Path, tmp_path: Path, format: str) -> None:
    """Fails if tensor-parallel shards start, train or are stored as others do not."""
    alone = curve(ranks, config_of(corpus, tmp_path / "alone", format, "bf16"))
    parallel = {"tensor_parallel_size": 2, "sequence_parallel": True}
    curve(ranks, config_of(corpus, tmp_path / "two", format, "fp8", parallel=parallel), 2, stop=STOP)
    crossed = curve(ranks, config_of(corpus, tmp_path / "two", format, "bf16"))
    assert crossed == pytest.approx(alone, rel=2e-2)
