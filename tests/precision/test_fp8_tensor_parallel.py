"""Are the shards of a linear layer quantised as the whole one, where their edges are those of blocks? The oracle is the
whole layer on every rank. Each shard has the largest number, so that its maximum is that of the whole."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_train.ops.rms_norm import rms_norm
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.precision.emulation import Emulation, fp8_linear
from nemotron_train.precision.recipe import fp8_recipe
from nemotron_train.trainer import build_runtime
from tests.engine.live import live_groups
from tests.precision.small_fp8 import FORMATS, SEQ, TP2_SP, fp8_config
from tests.ranks import RankPool

HIDDEN, FFN = 256, 512  # two blocks of 128 in each shard


def numbers(seed: int, *shape: int) -> Tensor:
    """Random numbers with the largest in the first row and column of both halves of either dimension."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for row in (0, shape[0] // 2):
        for column in (0, shape[-1] // 2):
            x[row, ..., column] = 16.0
    return x.bfloat16()


def differences(folder: Path) -> dict[str, float]:
    """How far this rank's part of every result is from the same part of the whole layer's, by format and layer."""
    found = {}
    parallel = {**TP2_SP, "overlap_grad_reduce": False}
    configs = {
        format: fp8_config(
            folder, folder, format, steps=4, parallel=parallel, model={"hidden_size": HIDDEN, "ffn_hidden_size": FFN}
        )
        for format in FORMATS
    }
    with live_groups(configs[FORMATS[0]]) as (platform, groups):
        for format, config in configs.items():
            run = build_runtime(plan_run(config, launched_rank().world_size), platform, groups)
            layers = dict(run.chunks[0].module.named_modules())
            for name in ("linear_fc1", "linear_fc2"):
                is_column = name == "linear_fc1"
                sizes = (FFN, HIDDEN) if is_column else (HIDDEN, FFN)
                pair = one_layer(layers[f"decoder.layers.1.mlp.{name}"], fp8_recipe(config.precision), groups, sizes)
                for what, (part, whole) in zip(("y", "dx", "dweight"), pair, strict=True):
                    error = (part.float() - whole.float()).norm() / whole.float().norm()
                    found[f"{format.value} {name} {what}"] = float(error)
    return found


def one_layer(linear: Any, recipe: Any, groups: Any, sizes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Two uses, so that delayed scaling has scales of its own; the second one's results, each beside the whole's."""
    outputs, inputs = sizes
    is_column = outputs == FFN
    x, weight, dy = numbers(0, SEQ, 2, inputs), numbers(1, outputs, inputs), numbers(2, SEQ, 2, outputs)
    whole = Emulation(recipe)
    quantizers = whole.new_quantizers()

    def mine(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(2, dim)[groups.tp.rank()]

    for _ in range(2):
        part_x = mine(x, 0 if is_column else -1).clone().requires_grad_()
        with torch.no_grad():
            linear.weight.copy_(mine(weight, 0 if is_column else 1))
            linear.weight.main_grad.zero_()
        linear.is_first_microbatch = True
        with linear.emulation.enter(groups.tp_dp_cp):
            y = linear(part_x)[0]
        y.backward(mine(dy, -1 if is_column else 0))

        whole_x, whole_weight = x.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
        whole_weight.main_grad = torch.zeros(weight.shape)
        normed = whole_x
        if is_column:
            wide = whole_x.float() if whole.is_delayed else whole_x
            normed = rms_norm(wide, torch.ones(inputs, dtype=torch.bfloat16), epsilon=linear.epsilon)
        with whole.enter(None):
            whole_y = fp8_linear(normed, whole_weight, quantizers, whole, fresh=True)
        whole_y.backward(dy)
    return [
        (y, mine(whole_y, -1 if is_column else 0)),
        (part_x.grad, mine(whole_x.grad, 0 if is_column else -1)),
        (linear.weight.main_grad, mine(whole_weight.main_grad, 0 if is_column else 1)),
    ]


def test_shards_are_quantised_as_the_whole(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if a split sequence is quantised in other blocks, or with another maximum, than the whole one, or if
    delayed scaling does not reduce its maxima. Weight gradients differ by the order of float32 sums; outputs and input
    gradients by a rounding of partial sums to bfloat16. Another operand makes 3e-2."""
    for found in ranks.run(differences, 2, tmp_path):
        for what, difference in found.items():
            assert difference < (1e-5 if what.endswith("dweight") else 4e-3), (what, difference)
