"""How long does one GPU take for each part that the planner adds up: layers, their cores, the ends, the optimizer?

The keys are those of a table (`plan/gpu_table.py`).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import inf

import torch

from nemotron_train.config.schema import PrecisionFormat
from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.engine.mcore_config import build_optimizer_config, build_transformer_config, weight_dtype
from nemotron_train.engine.optimizer import build_optimizer, set_hyperparameters, take_step
from nemotron_train.ops.implementations import best_operations
from nemotron_train.optim.parameter_groups import VECTOR_GROUPS
from nemotron_train.plan.gpu_table import FORMATS
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.plan.sizes import mlp_weights
from nemotron_train.probe.chunks import Bench, Measurement, build_chunk, launch_ms, layer_ms, residual

SHORT_CALLS = 4  # at once, of what takes a few milliseconds
LONG = 4  # times the sample, for what takes less than a millisecond
STATE_BYTES = 18  # of a parameter: weight and gradient, master weight and moments
UPDATED = 12  # MLP layers whose update is measured, where 45 GB are free for their state: starting it counts little

# Shapes: S sequence, B micro-batch, D hidden, H heads, G query groups, P head dim, f packed projection, V vocabulary.


def measurements(bench: Bench) -> Iterator[Measurement]:
    """Yield everything that one GPU tells. Cores, norms, ends and optimizer work in bf16 or float32 in all formats."""
    for kind in LayerKind:
        for format in FORMATS:
            yield f"layer_ms.{kind.name}.{format.value}", partial(layer_ms, bench, kind, format)
    for kind in LayerKind:
        for format in FORMATS:
            yield f"launch_ms.{kind.name}.{format.value}", partial(launch_ms, bench, kind, format)
    yield "core_ms.mamba", partial(mamba_core_ms, bench)
    yield "core_ms.attention", partial(attention_core_ms, bench)
    yield "norm_and_residual_ms", partial(norm_and_residual_ms, bench)
    yield "head_ms", partial(head_ms, bench)
    yield "optimizer_ps_per_parameter", partial(optimizer_ps_per_parameter, bench)
    for format in FORMATS[1:]:
        yield f"first_pass_ps_per_weight.{format.value}", partial(first_pass_ps_per_weight, bench, format)


def mamba_core_ms(bench: Bench) -> float:
    """Return convolution, scan and gated norm of one mixer."""
    bench = bench.with_layers(LayerKind.mamba.value, PrecisionFormat.bf16)
    chunk = build_chunk(bench, (LayerKind.mamba,), has_ends=False)
    (layer,) = chunk.module.decoder.layers
    sizes = layer.mixer.sizes
    zxBCdt_SBf = bench.random(bench.config.train.seq_length, 1, sizes.inner + sizes.conv_channels + sizes.heads)
    gradient_SBi = bench.random(bench.config.train.seq_length, 1, sizes.inner).detach()

    def forward_backward() -> None:
        zxBCdt_SBf.grad = None
        with chunk.no_sync():
            layer.mixer.mix(None, zxBCdt_SBf).backward(gradient_SBi)

    return bench.median_ms(forward_backward, SHORT_CALLS)


def attention_core_ms(bench: Bench) -> float:
    """Return attention between its projections."""
    bench = bench.with_layers(LayerKind.attention.value, PrecisionFormat.bf16)
    chunk = build_chunk(bench, (LayerKind.attention,), has_ends=False)
    (layer,) = chunk.module.decoder.layers
    attention, model, tokens = layer.self_attention, bench.config.model, bench.config.train.seq_length
    query_SBHP = bench.random(tokens, 1, model.num_attention_heads, model.attention_head_dim)
    key_SBGP, value_SBGP = (bench.random(tokens, 1, model.num_query_groups, model.attention_head_dim) for _ in range(2))
    gradient_SBo = bench.random(tokens, 1, model.num_attention_heads * model.attention_head_dim).detach()

    def forward_backward() -> None:
        query_SBHP.grad = key_SBGP.grad = value_SBGP.grad = None
        out_SBo = attention.core_attention(
            query_SBHP, key_SBGP, value_SBGP, None, attn_mask_type=attention.attn_mask_type
        )
        out_SBo.backward(gradient_SBo)

    return bench.median_ms(forward_backward, SHORT_CALLS)


def norm_and_residual_ms(bench: Bench) -> float:
    """Return a norm and the addition of a layer's output to what it read; of a long sample, since with a short one the
    GPU waits for the CPU to start the next kernel."""
    long = replace(bench.config.train, seq_length=LONG * bench.config.train.seq_length)
    bench = replace(bench, config=replace(bench.config, train=long))
    bench = bench.with_layers(LayerKind.mlp.value, PrecisionFormat.bf16)
    plan = plan_run(bench.config, bench.groups.tp.size())
    parts = choose_layer_parts(plan, bench.platform)
    operations = best_operations(bench.platform.device, weight_dtype(bench.config))
    config = build_transformer_config(plan, operations, parts)
    norm = parts.norm(config, config.hidden_size, config.layernorm_epsilon)
    x_SBD, gradient_SBD = residual(bench), residual(bench).detach()

    def forward_backward() -> None:
        x_SBD.grad = None
        (x_SBD + norm(x_SBD)).backward(gradient_SBD)

    return bench.median_ms(forward_backward) / LONG


def head_ms(bench: Bench) -> float:
    """Return a model without layers: embedding, final norm, output layer, loss."""
    bench = bench.with_layers(LayerKind.mlp.value, PrecisionFormat.bf16)
    chunk = build_chunk(bench, (), has_ends=True)
    tokens, vocabulary = bench.config.train.seq_length, bench.config.model.vocab_size
    tokens_BS = torch.randint(vocabulary, (1, tokens), device=bench.platform.device)
    labels_BS = tokens_BS.roll(-1, 1)

    def forward_backward() -> None:
        with chunk.no_sync():
            (chunk(tokens_BS, labels_BS).sum() / tokens).backward()

    return bench.median_ms(forward_backward)


def optimizer_ps_per_parameter(bench: Bench) -> float:
    """Return AdamW's step with the norm of all gradients, by parameter of a stack of MLP layers. The norm is too small
    to be clipped, as in most steps of a run."""
    free = torch.cuda.mem_get_info()[0] if bench.platform.is_cuda else inf
    layers = int(min(UPDATED, max(0.8 * free / (STATE_BYTES * mlp_weights(bench.config.model)), 1)))
    bench = bench.with_layers(LayerKind.mlp.value * layers, PrecisionFormat.bf16)
    chunk = build_chunk(bench, (LayerKind.mlp,) * layers, has_ends=False)
    optimizer = build_optimizer(build_optimizer_config(bench.config), [chunk], VECTOR_GROUPS)
    parameters = sum(parameter.numel() for parameter in chunk.parameters())
    for buffer in chunk.buffers:
        buffer.grad_data.fill_(1e-6)

    def update() -> None:
        set_hyperparameters(optimizer, bench.config.optim, bench.config.lr.peak)
        optimizer.zero_grad()
        assert take_step(optimizer).updated

    return 1e9 * bench.median_ms(update) / parameters


def first_pass_ps_per_weight(bench: Bench, format: PrecisionFormat) -> float:
    """Return how much longer MLP layers take in a step's first micro-batch, which quantises their weights."""
    first = layer_ms(bench, LayerKind.mlp, format, is_first_micro_batch=True)
    later = layer_ms(bench, LayerKind.mlp, format)
    return max(1e9 * (first - later) / mlp_weights(bench.config.model), 0.0)
