"""How fast, and in how much memory, does a training step of a slice of the 12B run on this GPU, in each precision?

    python -m benchmarks.train_step [key=value ...]
    python -m benchmarks.train_step --baseline FILE [key=value ...]
    python -m benchmarks.train_step --profile PRECISION [key=value ...]

Each precision runs in a process of its own, on the recipe's model cut to 18 layers, with random tokens of the whole
vocabulary. Timed is one micro-batch forward and backward with its gradient accumulation and reduction, and after that
the whole step with clipping and AdamW. `--baseline` runs a script that times the same forward and backward of another
trainer between ours, in the same command: it takes `--fp8 none|blockwise|tensorwise` and prints a line of JSON with
`tokens_per_second_per_gpu` and `peak_gib`. `--profile` prints which kernels the time goes to. Read the ratios;
`benchmarks/README.md` has figures.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.batch import Batch, build_batch
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.wrap import zero_gradients
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.runtime import Runtime
from nemotron_train.step import run_all, train_step
from nemotron_train.trainer import build_runtime

STEPS, WARMUP = 8, 3
BASELINE_NAMES = {"bf16": "none", "fp8_block": "blockwise", "fp8_current": "tensorwise"}
# Kernels by what they do, the first match counts.
KERNEL_GROUPS = (
    ("FP8 products", r"e4m3|e5m2|fp8.*gemm|sm90_fp8"),
    ("quantisation", r"quant|cast|transpose.*fp8|fp8.*transpose|block_scal"),
    ("Mamba scan", r"_chunk_|_state_passing|_bmm_chunk|ssd"),
    ("Mamba convolution", r"causal_conv"),
    ("attention", r"fmha|flash|cudnn.*sdpa|sdpa"),
    ("cross-entropy", r"softmax|cross_entropy|element_mul"),
    ("gated norm", r"_layer_norm_(fwd|bwd)"),
    ("RMSNorm", r"rmsnorm|norm_(fwd|bwd)|layernorm|ln_"),
    ("bf16 products", r"gemm|nvjet|cutlass|cublas"),
    ("squared ReLU", r"srelu|relu|gated_act|act_kernel"),
    ("communication", r"nccl"),
    ("gradient scaling and clearing", r"multi_tensor|fill|Memset|vectorized_elementwise.*MulFunctor<float>"),
    ("residual and other elementwise", r"elementwise|reduce|copy|Memcpy"),
)
SLICE = (
    "experiment=own_text",
    "model=nemotron_nano_12b_v2",
    "model.layer_pattern=M-M-M-M*-M-M-M-M*-",
    "train.seq_length=8192",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "precision.bf16_first_layers=0",
    "precision.bf16_last_layers=0",
)


def load(precision: str, overrides: list[str]) -> RunConfig:
    config = load_config([*SLICE, f"precision={precision}", *overrides])
    return replace(config, run=replace(config.run, dir=tempfile.mkdtemp()))


def random_batches(config: RunConfig) -> list[Batch]:
    train = config.train
    count = train.global_batch_size // train.micro_batch_size
    shape = (count, train.micro_batch_size, train.seq_length + 1)
    windows = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(3)).numpy()
    return [
        build_batch(list(rows), [0] * train.micro_batch_size, train.micro_batch_size, train.seq_length)
        for rows in windows
    ]


def milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(WARMUP + STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARMUP:])


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def measure(precision: str, overrides: list[str]) -> dict[str, object]:
    """Time one precision in this process."""
    config = load(precision, overrides)
    me, plan = launched_rank(), plan_run(config, 1)
    platform = choose_platform(me)
    with process_groups(plan.layout, platform, me, timeout_seconds=600, seed=1) as groups:
        run, batches = build_runtime(plan, platform, groups), random_batches(config)
        master_weights = torch.cuda.memory_allocated() / 2**30
        forward_backward = milliseconds(lambda: _accumulate(run, batches))
        result = {
            "precision": precision,
            "forward_backward_ms": forward_backward,
            "tokens_per_second_per_gpu": plan.tokens_per_step / forward_backward * 1e3,
            "peak_gib": peak_gib(),
            "held_before_gib": master_weights,
        }
        losses: list[float] = []
        step_ms = milliseconds(lambda: losses.append(train_step(run, batches, config.lr.warmup_tokens).loss.loss))
        return {**result, "step_ms": step_ms, "step_peak_gib": peak_gib(), "losses": losses}


def profile(precision: str, overrides: list[str]) -> None:
    """Print the GPU time of one forward and backward by group of kernels, and the longest kernels."""
    config = load(precision, overrides)
    me, plan = launched_rank(), plan_run(config, 1)
    platform = choose_platform(me)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with process_groups(plan.layout, platform, me, timeout_seconds=600, seed=1) as groups:
        run, batches = build_runtime(plan, platform, groups), random_batches(config)
        whole = milliseconds(lambda: _accumulate(run, batches))
        with torch.profiler.profile(activities=activities) as recorded:
            _accumulate(run, batches)
            torch.cuda.synchronize()
    kernels = [e for e in recorded.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda kernel: -kernel.self_device_time_total)
    groups_ms: dict[str, float] = {}
    for kernel in kernels:
        group = next((name for name, form in KERNEL_GROUPS if re.search(form, kernel.key, re.IGNORECASE)), "other")
        groups_ms[group] = groups_ms.get(group, 0.0) + kernel.self_device_time_total / 1e3
    total = sum(groups_ms.values())
    table = Table("group", "ms", "share", title=f"{precision}: {total:.1f} ms of kernels in {whole:.1f} ms")
    for group, spent in sorted(groups_ms.items(), key=lambda item: -item[1]):
        table.add_row(group, f"{spent:.2f}", f"{spent / total:.1%}")
    Console(width=120).print(table)
    for kernel in kernels[:60]:
        print(f"{kernel.self_device_time_total / 1e3:8.2f} ms {kernel.count:4d}x {kernel.key[:150]}")


def _accumulate(run: Runtime, batches: list[Batch]) -> None:
    zero_gradients(run.chunks)
    run_all(run, batches, forward_only=False)


def run_json(command: list[str]) -> dict[str, float]:
    """Run a measurement in a process of its own and return its last line of JSON."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MASTER_PORT": "29533"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode} and printed no result:\n{done.stdout}")
    print(lines[-1], flush=True)
    return json.loads(lines[-1])


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--measure"]:
        print(json.dumps(measure(arguments[1], arguments[2:])), flush=True)
        return
    if arguments[:1] == ["--profile"]:
        profile(arguments[1], arguments[2:])
        return
    baseline = None
    if arguments[:1] == ["--baseline"]:
        baseline, arguments = arguments[1], arguments[2:]
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, forward and backward of the 18-layer slice"
    table = Table(
        "precision", "ours, tokens/s", "peak GiB", "whole step, ms", "baseline, tokens/s", "ratio", title=title
    )
    for precision, name in BASELINE_NAMES.items():
        ours = run_json([sys.executable, "-m", "benchmarks.train_step", "--measure", precision, *arguments])
        cells = [f"{ours[key]:,.0f}" for key in ("tokens_per_second_per_gpu", "peak_gib", "step_ms")]
        if baseline is not None:
            theirs = run_json([sys.executable, baseline, "--fp8", name])["tokens_per_second_per_gpu"]
            cells += [f"{theirs:,.0f}", f"{ours['tokens_per_second_per_gpu'] / theirs:.3f}"]
        table.add_row(precision, *cells, *[""] * (5 - len(cells)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
