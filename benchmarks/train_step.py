"""How fast, and in how much memory, does the trainer step on these GPUs, in each precision and beside another trainer?

    python -m benchmarks.train_step slice [--baseline FILE] [--precisions P,P] [--profile] [key=value ...]
    python -m benchmarks.train_step whole [--baseline FILE] [--precisions P,P] [--profile] [key=value ...]

`slice` is 18 layers of the 12B recipe's model on one GPU: forward and backward of one micro-batch with its gradient
accumulation and reduction, and after that whole steps. `whole` is the 12B on two GPUs, tensor parallel with sequence
parallelism, 8 micro-batches a step, gradients and moments in bf16, optimizer included. Steps are the trainer's own
(`step.train_step`), fed by its loader from shards of random tokens of the whole vocabulary. Each precision runs in
processes of its own.

`--baseline` runs a script that times the same work of another trainer straight after each of ours: it takes `--fp8
none|blockwise|tensorwise`, for `whole` also `--full --microbatches 8 --steps 4` under torchrun, and prints a line of
JSON with `tokens_per_second_per_gpu` and `peak_gib`. `--profile` prints which kernels the time goes to. Read the
ratios; `benchmarks/README.md` has figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernel_shares import kernel_shares
from data_tools.shard_writer import write_shard
from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.batch import Batch
from nemotron_train.data.loader import DataLoader
from nemotron_train.data.run_data import open_run_data
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.user_buffers import user_buffers
from nemotron_train.engine.wrap import zero_gradients
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.runtime import Runtime
from nemotron_train.step import run_all, train_step
from nemotron_train.trainer import build_runtime

BASELINE_NAMES = {"bf16": "none", "fp8_block": "blockwise", "fp8_current": "tensorwise"}


@dataclass(frozen=True)
class Shape:
    gpus: int
    warmup: int
    steps: int
    overrides: tuple[str, ...]
    baseline_arguments: tuple[str, ...]
    compared: str  # key of our measurement that the other trainer's tokens/s are compared with


SHAPES = {
    "slice": Shape(
        gpus=1,
        warmup=3,
        steps=8,
        overrides=(
            "model.layer_pattern=M-M-M-M*-M-M-M-M*-",
            "train.global_batch_size=1",
            "precision.bf16_first_layers=0",
            "precision.bf16_last_layers=0",
        ),
        baseline_arguments=(),
        compared="forward_backward_tokens_per_second_per_gpu",
    ),
    "whole": Shape(
        gpus=2,
        warmup=3,
        steps=4,
        overrides=(
            "parallel=tensor_2",
            "train.global_batch_size=8",
            "optim.gradients=bf16",
            "optim.moments=bf16",
        ),
        baseline_arguments=("--full", "--microbatches", "8", "--steps", "4"),
        compared="step_tokens_per_second_per_gpu",
    ),
}
COMMON = (
    "experiment=own_text",
    "model=nemotron_nano_12b_v2",
    "train.seq_length=8192",
    "train.micro_batch_size=1",
    "data.sources.0.eval_prefixes=[]",
    "train.eval_every_steps=0",
    "checkpoint.every_steps=0",
)


def configure(shape: Shape, precision: str, corpus: Path, overrides: list[str]) -> RunConfig:
    ends = () if precision.startswith("fp8") else ("precision.bf16_first_layers=0", "precision.bf16_last_layers=0")
    places = (f"data.path={corpus}", f"run.dir={corpus / 'run'}", "data.max_epochs=1000000")
    return load_config([*COMMON, f"precision={precision}", *shape.overrides, *ends, *places, *overrides])


def write_corpus(folder: Path, vocab_size: int) -> None:
    """Random tokens, about 4 million of them, and a tokenizer of that vocabulary."""
    random = np.random.default_rng(3)
    (folder / "train").mkdir()
    documents = [random.integers(0, vocab_size, size=4096, dtype=np.int32) for _ in range(1024)]
    write_shard(folder / "train" / "random", documents, np.dtype(np.int32))
    vocabulary = {str(number): number for number in range(vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))


def measure(name: str, precision: str, corpus: Path, profile: bool, overrides: list[str]) -> None:
    """Time one precision on this process's rank; rank 0 prints the figures as JSON."""
    shape, me = SHAPES[name], launched_rank()
    config = configure(shape, precision, corpus, overrides)
    plan, platform = plan_run(config, me.world_size), choose_platform(me)
    held = process_groups(plan.layout, platform, me, timeout_seconds=600, seed=1)
    with held as groups, user_buffers(plan):
        run = build_runtime(plan, platform, groups)
        optimizer_gib = optimizer_bytes(run) / 2**30
        data = open_run_data(config)
        figures: dict[str, object] = {"precision": precision, "device": device_name()}
        with DataLoader(data.reader, run.share, plan.batches.global_batch_size_at) as loader:

            def micro_batches() -> list[Batch]:
                return [next(loader) for _ in range(plan.batches.num_micro_batches_at(0))]

            losses: list[float] = []

            def step() -> None:
                losses.append(train_step(run, micro_batches(), config.lr.warmup_tokens).loss.loss)

            def figures_of(kind: str, work: Callable[[], object]) -> dict[str, float]:
                seconds = median_seconds(work, shape, platform.synchronize)
                speed = plan.tokens_per_step / seconds / me.world_size
                return {
                    f"{kind}_ms": seconds * 1e3,
                    f"{kind}_tokens_per_second_per_gpu": speed,
                    f"{kind}_tflops_per_gpu": speed * plan.flops_per_token_at(0) / 1e12,
                    f"{kind}_peak_gib": peak_gib(),
                }

            if name == "slice":
                figures |= figures_of("forward_backward", lambda: accumulate(run, micro_batches()))
                # The other trainer's slice holds no optimizer.
                figures["forward_backward_peak_gib"] = peak_gib() - optimizer_gib
            figures |= figures_of("step", step)
            figures["losses"] = [round(loss, 3) for loss in losses]
            shares = kernel_shares(step) if profile else None
        run.close()
    if me.rank == 0:
        if shares is not None:
            table = Table("group", "ms", "share", title=f"{precision}: {shares.total_ms:.1f} ms of kernels in a step")
            for group, spent in shares.group_ms.items():
                table.add_row(group, f"{spent:.2f}", f"{spent / shares.total_ms:.1%}")
            Console(width=120).print(table)
            for kernel, calls, spent in shares.longest:
                print(f"{spent:8.2f} ms {calls:4d}x {kernel[:150]}")
        print(json.dumps(figures), flush=True)


def accumulate(run: Runtime, batches: list[Batch]) -> None:
    zero_gradients(run.chunks)
    run_all(run, batches, forward_only=False)


def median_seconds(work: Callable[[], object], shape: Shape, synchronize: Callable[[], None]) -> float:
    times = []
    for _ in range(shape.warmup + shape.steps):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[shape.warmup :])


def optimizer_bytes(run: Runtime) -> int:
    """What the optimizer holds before its first update: float32 master weights, where weights are in bf16."""
    parts = run.optimizer.chained_optimizers
    held = {
        id(parameter): parameter
        for part in parts
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    }
    return sum(parameter.nbytes for parameter in held.values() if parameter.dtype is torch.float32)


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def run_json(command: list[str], gpus: int) -> dict[str, float]:
    """Run a measurement in processes of its own, pass on what it prints, and return its last line of JSON."""
    launcher = [sys.executable, *(("-m", "torch.distributed.run", "--nproc-per-node", str(gpus)) if gpus > 1 else ())]
    ports = {"MASTER_PORT": "29533"}
    process = subprocess.run([*launcher, *command], stdout=subprocess.PIPE, text=True, env={**os.environ, **ports})
    sys.stdout.write(process.stdout)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} and printed no result.")
    return json.loads(lines[-1])


@contextmanager
def corpus_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), vocab_size=131072)
        yield Path(folder)


def compare(options: argparse.Namespace, overrides: list[str]) -> None:
    """Measure every precision, ours and the other trainer's by turns, and print the table."""
    name, shape = options.shape, SHAPES[options.shape]
    title = f"{device_name()} x {shape.gpus}, torch {torch.__version__}, {name}"
    table = Table(title=title)
    for column in ("precision", "ours, tokens/s per GPU", "TFLOP/s", "peak GiB", "whole step, ms"):
        table.add_column(column)
    for column in ("baseline, tokens/s per GPU", "its peak GiB", "ratio"):
        table.add_column(column)
    kind = shape.compared.removesuffix("_tokens_per_second_per_gpu")
    with corpus_folder() as corpus:
        for precision in options.precisions.split(","):
            module = ["-m", "benchmarks.train_step", "measure", name, precision, str(corpus)]
            ours = run_json([*module, *(["--profile"] if options.profile else []), *overrides], shape.gpus)
            row = [f"{ours[shape.compared]:,.0f}", f"{ours[f'{kind}_tflops_per_gpu']:,.0f}"]
            row += [f"{ours[f'{kind}_peak_gib']:.1f}", f"{ours['step_ms']:,.0f}"]
            if options.baseline:
                command = [options.baseline, "--fp8", BASELINE_NAMES[precision], *shape.baseline_arguments]
                theirs = run_json(command, shape.gpus)
                speed = theirs["tokens_per_second_per_gpu"]
                row += [f"{speed:,.0f}", f"{theirs['peak_gib']:.1f}", f"{ours[shape.compared] / speed:.3f}"]
            table.add_row(precision, *row)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="shape", required=True)
    for name in SHAPES:
        command = commands.add_parser(name)
        command.add_argument("--baseline", metavar="FILE")
        command.add_argument("--precisions", default=",".join(BASELINE_NAMES))
        command.add_argument("--profile", action="store_true")
    one = commands.add_parser("measure", help="one precision, in this process")
    one.add_argument("name", choices=SHAPES)
    one.add_argument("precision")
    one.add_argument("corpus", type=Path)
    one.add_argument("--profile", action="store_true")
    options, overrides = parser.parse_known_args()
    if options.shape == "measure":
        measure(options.name, options.precision, options.corpus, options.profile, overrides)
    else:
        compare(options, overrides)


if __name__ == "__main__":
    main()
