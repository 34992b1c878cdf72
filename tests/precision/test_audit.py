"""Does the list of products that a run prints equal what really runs in FP8?"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_train.config.schema import PrecisionFormat
from nemotron_train.engine.emulated_layers import record_quantized_products
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.step import run_all
from nemotron_train.trainer import build_runtime
from tests.engine.live import live_groups, live_run, micro_batches, random_samples
from tests.precision.small_fp8 import BATCH, TP2_SP, fp8_config
from tests.ranks import RankPool

CASES: list[tuple[str, int, int]] = [
    ("fp8_block", 0, 0),
    ("fp8_block", 2, 2),
    ("fp8_current", 0, 1),
    ("fp8_delayed", 0, 0),
]
WIDE = {"fp8_block": "e4m3", "fp8_current": "e5m2", "fp8_delayed": "e5m2"}  # format of gradients

GPU_SIZES = dict(attention_head_dim=64, mamba_num_heads=16, mamba_head_dim=64, mamba_state_dim=64, mamba_chunk_size=64)

Ran = list[tuple[set[str], Counter[tuple[str, str, tuple[str, str]]]]]


def what_ran(folder: Path, parallel: dict[str, Any]) -> Ran:
    """For every case: the linear layers that the plan has in FP8, and the products that were quantised in a step."""
    found = []
    configs = [
        fp8_config(
            folder,
            folder,
            PrecisionFormat(format),
            steps=4,
            parallel=parallel,
            precision={"format": PrecisionFormat(format), "bf16_first_layers": first, "bf16_last_layers": last},
        )
        for format, first, last in CASES
    ]
    with live_groups(configs[0]) as (platform, groups):
        for config in configs:
            plan = plan_run(config, launched_rank().world_size)
            run = build_runtime(plan, platform, groups)
            batches = micro_batches(random_samples(0, BATCH, config), 2)
            with record_quantized_products(run.chunks[0].module) as products:
                run_all(run, batches, forward_only=False)
            formats = Counter((one.linear, one.product, (one.formats[0].name, one.formats[1].name)) for one in products)
            found.append(({gemm.name for gemm in plan.gemms if gemm.in_fp8}, formats))
    return found


@pytest.mark.parametrize("parallel", [{}, TP2_SP], ids=["alone", "tp2_sp"])
def test_what_runs_in_fp8_is_what_the_plan_lists(ranks: RankPool, tmp_path: Path, parallel: dict[str, Any]) -> None:
    """Fails if a product that the banner calls FP8 runs in bf16 or the other way round, forward or backward, on any
    rank, or has operands of another format."""
    for of_rank in ranks.run(what_ran, 2 if parallel else 1, tmp_path, parallel):
        for (format, _, _), (listed, ran) in zip(CASES, of_rank, strict=True):
            gradient = WIDE[format]
            expected = {
                (name, *product): 2  # micro-batches
                for name in listed
                for product in (
                    ("forward", ("e4m3", "e4m3")),
                    ("data gradient", (gradient, "e4m3")),
                    ("weight gradient", (gradient, "e4m3")),
                )
            }
            assert listed
            assert ran == expected, format


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "first", "last"), CASES)
def test_transformer_engine_runs_in_fp8_what_the_plan_lists(tmp_path: Path, format: str, first: int, last: int) -> None:
    """Fails if a linear layer enters its product with FP8 switched off where the plan has it on, or the other way
    round."""
    precision = {"format": PrecisionFormat(format), "bf16_first_layers": first, "bf16_last_layers": last}
    config = fp8_config(tmp_path, tmp_path, PrecisionFormat(format), steps=4, precision=precision, model=GPU_SIZES)
    in_fp8: dict[str, bool] = {}
    with live_run(config) as run:
        for name, module in run.chunks[0].module.named_modules():
            if isinstance(getattr(module, "weight", None), torch.Tensor) and hasattr(module, "fp8_meta"):

                def note(module: Any, *_: Any, name: str = name) -> None:
                    in_fp8[name] = module.fp8  # set anew in every call

                module.register_forward_hook(note)
        run_all(run, micro_batches(random_samples(0, BATCH, config), 2), forward_only=False)
        listed = {gemm.name: gemm.in_fp8 for gemm in run.plan.gemms}
    assert in_fp8 == listed
