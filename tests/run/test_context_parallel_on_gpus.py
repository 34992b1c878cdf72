"""Do two GPUs that share out the tokens of each sample learn what one does? With Transformer Engine's attention, the
published kernels and NCCL, none of which a CPU run touches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_train.config.schema import PrecisionFormat
from tests.ranks import RankPool
from tests.run.test_gpu_runs import SIZES
from tests.small_runs import logged, small_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

CP2 = {"context_parallel_size": 2}
CP2_TP2 = {**CP2, "tensor_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("precision", "world_size", "layout"),
    [("fp32", 2, CP2), ("bf16", 2, CP2), ("fp8_block", 2, CP2), ("fp32", 4, CP2_TP2), ("bf16", 4, CP2_TP2)],
)
def test_losses_follow_those_of_one_gpu(
    ranks: RankPool, corpus: Path, tmp_path: Path, precision: str, world_size: int, layout: dict[str, Any]
) -> None:
    """Fails if attention passes keys on in another order than the batch has them, or a share of the heads is lost."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    curves = []
    for name, number, parallel in (("alone", 1, {}), ("together", world_size, layout)):
        config = small_config(
            corpus,
            tmp_path / name,
            steps=48,  # of 32 tokens a sample; 12 of these
            model=SIZES,
            precision={"format": PrecisionFormat(precision)},
            parallel=parallel,
            train={"seq_length": 128},
        )
        curves.append(logged("loss", ranks.run(train, number, config)[0]))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4 if precision == "fp32" else 2e-2)
