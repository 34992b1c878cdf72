"""Do the GPU's attention and scan tell documents apart as the plain layers do?"""

import pytest
import torch

from nemotron_train.data.batch import build_batch
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.wrap import zero_gradients
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.step import run_all
from nemotron_train.trainer import build_runtime
from tests.engine.test_transformer_engine import config_in

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_documents_on_a_gpu_give_the_gradients_of_the_plain_layers(micro_batch_size: int) -> None:
    """Fails if the kernels get other bounds than the plain layers, or read them in another order."""
    configs = {precision: config_in(precision, micro_batch_size) for precision in ("fp32", "bf16")}
    length = configs["fp32"].train.seq_length
    tokens = torch.randint(10, 4096, (4, length + 1), generator=torch.Generator().manual_seed(1)).numpy()
    for row, ends in zip(tokens, ([127, 300], [0, 255, 256], [], [511]), strict=True):
        row[ends] = 2
    batches = [
        build_batch(tokens[at : at + micro_batch_size], [0] * micro_batch_size, micro_batch_size, length, eod_id=2)
        for at in range(0, 4, micro_batch_size)
    ]
    found = {}
    me = launched_rank()
    for precision, config in configs.items():
        plan, platform = plan_run(config, 1), choose_platform(me)
        with process_groups(plan.layout, platform, me, timeout_seconds=60, seed=1) as groups:
            run = build_runtime(plan, platform, groups)
            zero_gradients(run.chunks)
            run_all(run, batches, forward_only=False)
            found[precision] = {
                name: parameter.main_grad.float().clone() for name, parameter in run.chunks[0].module.named_parameters()
            }
    for name, expected in found["fp32"].items():
        assert (found["bf16"][name] - expected).norm() <= 0.04 * expected.norm(), name
