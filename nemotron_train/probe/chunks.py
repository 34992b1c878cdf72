"""What is measured, and how: pieces of the real model on this rank, run again and again.

A piece is a model chunk as a pipeline stage holds it (`model/hybrid_model.py`), with the gradient buffers of data
parallelism, so that weight gradients are accumulated as in training. Weights are quantised in the first pass alone, as
in a step of many micro-batches, unless a measurement asks for it.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import PrecisionFormat, RunConfig
from nemotron_train.engine.groups import Groups
from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.engine.mcore_config import build_ddp_config, build_transformer_config, weight_dtype
from nemotron_train.engine.wrap import ModelChunk, wrap_in_data_parallel
from nemotron_train.model.hybrid_model import ChunkPlace, HybridModel
from nemotron_train.model.init import initialize_weights
from nemotron_train.ops.implementations import best_operations
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import Platform

# Shapes: s this rank's part of a sample, B micro-batch, D hidden.

PROBED = (  # the model of the shipped table, with samples of its length
    "experiment=own_text",
    "model=nemotron_nano_12b_v2",
    "train.seq_length=8192",
    "train.global_batch_size=1",
    "train.micro_batch_size=1",
    "train.eval_every_steps=0",
    "checkpoint.every_steps=0",
    "precision=bf16",
)
WARMUP, REPEATS = 3, 8
LAUNCHED_TOKENS = 256  # so few that the GPU waits for the CPU; whole blocks of FP8
Measurement = tuple[str, Callable[[], float | tuple[float, ...]]]  # key of the table, what measures it
STACKED = 4  # layers of a kind, so that each follows and is followed by another


@dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    config: RunConfig  # the model, its sample length and its layout; layers and precision are the measurements'
    platform: Platform
    groups: Groups
    repeats: int = REPEATS

    def with_layers(self, pattern: str, format: PrecisionFormat) -> "Bench":
        model = replace(self.config.model, layer_pattern=pattern)
        precision = replace(self.config.precision, format=format, bf16_first_layers=0, bf16_last_layers=0)
        return replace(self, config=replace(self.config, model=model, precision=precision))

    def random(self, *shape: int) -> Tensor:
        """Draw something to run on, in the type of the weights."""
        dtype = weight_dtype(self.config)
        return torch.randn(shape, dtype=dtype, device=self.platform.device, requires_grad=True)

    def median_ms(self, work: Callable[[], object], calls: int = 1) -> float:
        """Return the median time of `work`, of `calls` calls at once where one is too short for the clock."""
        times = []
        for _ in range(WARMUP + self.repeats):
            self.platform.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                work()
            self.platform.synchronize()
            times.append(time.perf_counter() - began)
        return 1e3 * statistics.median(times[WARMUP:]) / calls


def probed_config(*overrides: str) -> RunConfig:
    return load_config([*PROBED, *overrides])


def build_chunk(bench: Bench, kinds: tuple[LayerKind, ...], *, has_ends: bool) -> ModelChunk:
    """Build layers of `kinds` in the precision of the bench; with embedding and output layer, or with neither."""
    free_memory()  # chunks that were measured refer to themselves in circles
    plan = plan_run(bench.config, bench.groups.tp.size())
    ops = best_operations(bench.platform.device, weight_dtype(bench.config))
    parts = choose_layer_parts(plan, bench.platform)
    config = build_transformer_config(plan, ops, parts)
    place = ChunkPlace(first_layer=0, kinds=kinds, virtual_stage=None, is_first=has_ends, is_last=has_ends)
    chunk = HybridModel(config, plan.config, place, parts, ops, bench.groups)
    initialize_weights(
        chunk,
        plan.config.model,
        seed=plan.config.run.seed,
        num_layers=len(plan.layers),
        tp_rank=bench.groups.tp.rank(),
        tp_size=bench.groups.tp.size(),
    )
    (wrapped,) = wrap_in_data_parallel([chunk], config, build_ddp_config(bench.config), bench.groups)
    return wrapped


class LayerStack:
    """Some layers of a kind, and a hidden state to run them on."""

    def __init__(self, bench: Bench, kind: LayerKind, format: PrecisionFormat) -> None:
        bench = bench.with_layers(kind.value * STACKED, format)
        self.chunk = build_chunk(bench, (kind,) * STACKED, has_ends=False)
        self.x_sBD, self.gradient_sBD = residual(bench), residual(bench).detach()

    def forward(self) -> Tensor:
        self.x_sBD.grad = None
        self.chunk.module.set_input_tensor(self.x_sBD)
        return self.chunk(None)

    def backward(self, y_sBD: Tensor) -> None:
        with self.chunk.no_sync():  # as in every micro-batch but a step's last
            y_sBD.backward(self.gradient_sBD)

    def quantise_in_next_pass(self) -> None:
        self.chunk.module.set_is_first_microbatch()


def layer_ms(bench: Bench, kind: LayerKind, format: PrecisionFormat, *, is_first_micro_batch: bool = False) -> float:
    """Return the time of one layer of a stack of its kind, forward and backward.

    Args:
        is_first_micro_batch: weights are quantised in every pass.
    """
    stack = LayerStack(bench, kind, format)

    def forward_backward() -> None:
        if is_first_micro_batch:
            stack.quantise_in_next_pass()
        stack.backward(stack.forward())

    return bench.median_ms(forward_backward) / STACKED


def launch_ms(bench: Bench, kind: LayerKind, format: PrecisionFormat) -> tuple[float, float]:
    """Return the milliseconds the CPU takes to start the kernels of one layer, forward and backward, with samples so
    short that it never waits for the GPU."""
    short = replace(bench.config.train, seq_length=min(LAUNCHED_TOKENS, bench.config.train.seq_length))
    stack = LayerStack(replace(bench, config=replace(bench.config, train=short)), kind, format)
    spent = []
    for _ in range(WARMUP + bench.repeats):
        bench.platform.synchronize()
        began = time.perf_counter()
        y_sBD = stack.forward()
        turned = time.perf_counter()
        stack.backward(y_sBD)
        spent.append((turned - began, time.perf_counter() - turned))
    forward, backward = (statistics.median(times) for times in zip(*spent[WARMUP:], strict=True))
    return 1e3 * forward / STACKED, 1e3 * backward / STACKED


def residual(bench: Bench) -> Tensor:
    """Draw a hidden state between two layers."""
    tokens = bench.config.train.seq_length
    if bench.config.parallel.sequence_parallel:
        tokens //= bench.groups.tp.size()
    return bench.random(tokens, 1, bench.config.model.hidden_size)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
