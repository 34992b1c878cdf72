"""Are the published kernels, in the parts that ranks with a share of the heads run, those of plain torch in float64?"""

import pytest
import torch
from torch import Tensor

from nemotron_train.ops.documents import Documents
from nemotron_train.ops.implementations import Operations, operations
from nemotron_train.ops.mamba_core import CoreWeights, MixerSizes
from tests.ops.test_elementwise_operations import random

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

IN_FLOAT32 = ("dt_bias_H", "A_H", "D_H")
DIRECTIONS = 8  # of the gradient: with one head that of D is one number, in one direction perhaps near zero


@pytest.mark.parametrize("implementation", ["mamba_ssm", "triton"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (16, 2)])  # one head: rows of a length that no kernel likes
def test_conv_scan_and_gated_norm_equal_plain_torch(
    implementation: str, documents: bool, heads: int, groups: int
) -> None:
    """Fails if a kernel gets another layout than it takes, or an argument means something else to it."""
    sizes = MixerSizes(heads, head_dim=80, groups=groups, state=128, conv_kernel=4, chunk=128, epsilon=1e-5)
    seq_length, batch = 300, 2
    number_BS = (torch.arange(seq_length) >= torch.tensor([[127], [200]])).int()
    weights = CoreWeights(
        conv_CK=random(sizes.conv_channels, sizes.conv_kernel, seed=1),
        conv_bias_C=random(sizes.conv_channels, seed=2),
        dt_bias_H=random(heads, seed=3) - 3.0,
        A_H=-random(heads, seed=4).exp(),
        D_H=random(heads, seed=5),
        norm_I=random(sizes.inner, seed=6),
    )
    projected = random(seq_length, batch, sizes.inner + sizes.conv_channels + heads, seed=8).bfloat16()
    douts = [random(seq_length, batch, sizes.inner, seed=9 + direction).cuda() for direction in range(DIRECTIONS)]

    def run(ops: Operations, dtype: torch.dtype, wide: torch.dtype) -> list[Tensor]:
        leaves = [projected.to("cuda", dtype).requires_grad_()]
        for name, weight in weights._asdict().items():
            rounded = weight.float() if name in IN_FLOAT32 else weight.bfloat16()
            leaves.append(rounded.to("cuda", wide if name in IN_FLOAT32 else dtype).requires_grad_())
        z, xBCdt = leaves[0].split([sizes.inner, sizes.conv_channels + heads], dim=-1)
        apart = Documents(number_BS.cuda()) if documents else None
        y = ops.conv_scan(xBCdt.contiguous(), CoreWeights(*leaves[1:]), sizes, apart)
        out = ops.gated_rms_norm(y, z, leaves[-1], num_groups=groups, epsilon=sizes.epsilon)
        grads = [torch.autograd.grad(out, leaves, dout.to(out.dtype), retain_graph=True) for dout in douts]
        return [out.detach(), *(torch.stack(of_leaf) for of_leaf in zip(*grads, strict=True))]

    expected = run(operations("torch"), torch.float64, torch.float64)
    rounded = run(operations("torch"), torch.bfloat16, torch.float32)
    found = run(operations(implementation), torch.bfloat16, torch.float32)
    names = ("out", "d_projected", *CoreWeights._fields)
    for name, right, plain, ours in zip(names, expected, rounded, found, strict=True):
        of_rounding, difference = ((x.double() - right).norm() / right.norm() for x in (plain, ours))
        assert difference < 0.01 + 2 * of_rounding, f"{name}: {difference}, plain torch in bfloat16 {of_rounding}"
