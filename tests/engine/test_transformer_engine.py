"""Do Transformer Engine's layers and the published kernels give the gradients of the plain layers in float32?"""

import tempfile
from dataclasses import replace

import pytest
import torch

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.batch import Batch, build_batch
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.wrap import zero_gradients
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.runtime import Runtime
from nemotron_train.step import run_all
from nemotron_train.trainer import build_runtime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

MODEL = (
    "experiment=own_text",
    "model.layer_pattern=M-M*-",
    "model.hidden_size=512",
    "model.ffn_hidden_size=1024",
    "model.num_attention_heads=8",
    "model.attention_head_dim=64",
    "model.mamba_num_heads=16",
    "model.mamba_head_dim=64",
    "model.mamba_state_dim=128",
    "model.mamba_chunk_size=128",
    "model.vocab_size=4096",
    "train.seq_length=512",
    "train.global_batch_size=4",
)
# Relative L2 error of a parameter's gradient. bf16 keeps 8 bits, E4M3 keeps 4; errors add up over the layers.
TOLERANCE = {"bf16": 0.04, "fp8_block": 0.25, "fp8_current": 0.25, "fp8_delayed": 0.3}


# Another way to run the hybrid, and other models. No norm of keys has a bias here: softmax does not see it, so its
# gradient is noise.
PARTS: dict[str, tuple[str, ...]] = {
    "hybrid": (),
    "hybrid, computed again in the backward pass": ("train.recompute=full",),
    "biases, LayerNorm and learned positions": (
        "model.layer_pattern='*-*-'",
        "model.norm=layer",
        "model.linear_bias=true",
        "model.position_embedding=learned",
        "model.max_position_embeddings=512",
        "model.layer_scale=0.5",
    ),
    "rope and norms of queries and keys": (
        "model.layer_pattern='*-*-'",
        "model.position_embedding=rope",
        "model.qkv_norm=qk",
        "model.output_norm=true",
        "model.attention_logit_scale=0.5",
    ),
    "norms of values, capped": (
        "model.layer_pattern='*-*-'",
        "model.position_embedding=rope",
        "model.qkv_norm=qkv",
        "model.attention_logit_cap=5",
    ),
}


def config_in(precision: str, micro_batch_size: int, parts: str = "hybrid") -> RunConfig:
    overrides = [*PARTS[parts], f"precision={precision}", f"train.micro_batch_size={micro_batch_size}"]
    if precision in ("fp8_block", "fp8_current"):
        overrides += ["precision.bf16_first_layers=0", "precision.bf16_last_layers=0"]
    config = load_config([*MODEL, *overrides])
    return replace(config, run=replace(config.run, dir=tempfile.mkdtemp()))


def run_with_other_weights(run: Runtime, batches: list[Batch]) -> None:
    """Leave behind whatever layers keep from one step to the next. Matrices change their sign, so that the maxima which
    delayed scaling remembers still fit."""
    weights = [parameter.detach() for parameter in run.chunks[0].module.parameters() if parameter.ndim > 1]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.neg_()
    run_all(run, batches, forward_only=False)
    for weight, before in zip(weights, kept, strict=True):
        weight.copy_(before)


@pytest.mark.parametrize(("micro_batch_size", "parts"), [(1, "hybrid"), *((2, parts) for parts in PARTS)])
def test_gradients_are_those_of_the_plain_layers_in_float32(micro_batch_size: int, parts: str) -> None:
    """Fails if a kernel, a layout of its inputs or the accumulation of weight gradients over micro-batches is wrong, or
    if a step goes on with the gradients, or the FP8 copies of the weights, of an earlier step."""
    me = launched_rank()
    platform = choose_platform(me)
    windows = torch.randint(
        0, 4096, (4 // micro_batch_size, micro_batch_size, 513), generator=torch.Generator().manual_seed(3)
    ).numpy()
    batches = [build_batch(list(rows), [0] * micro_batch_size, micro_batch_size, 512) for rows in windows]
    layout = plan_run(config_in("fp32", micro_batch_size, parts), 1).layout
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    losses = {}
    with process_groups(layout, platform, me, timeout_seconds=60, seed=1) as groups:
        for precision in ("fp32", *TOLERANCE):
            run = build_runtime(plan_run(config_in(precision, micro_batch_size, parts), 1), platform, groups)
            run_with_other_weights(run, batches)
            for buffer in run.chunks[0].buffers:
                buffer.grad_data.fill_(float("nan"))  # what is neither cleared nor overwritten shows
            zero_gradients(run.chunks)
            losses[precision] = [float(report.nats_K.sum()) for report in run_all(run, batches, forward_only=False)]
            named = run.chunks[0].module.named_parameters()
            gradients[precision] = {name: parameter.main_grad.float().clone() for name, parameter in named}
    worst = {}
    for precision in TOLERANCE:
        assert gradients[precision].keys() == gradients["fp32"].keys()
        errors = {
            name: float((gradients[precision][name] - wanted).norm() / wanted.norm())
            for name, wanted in gradients["fp32"].items()
        }
        worst[precision] = sorted(errors.items(), key=lambda item: -item[1])[:4]
    print(losses, *worst.items(), sep="\n")
    for precision, found in worst.items():
        assert found[0][1] < TOLERANCE[precision], (precision, found)
