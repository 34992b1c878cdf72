"""How far is the planner from the trainer: memory and time of a step, planned and measured, at chosen points?

    python -m benchmarks.planner_points [--points A,B,C] [--output FILE] [--gpu h200|h100|FILE.json] [key=value ...]
    python -m benchmarks.planner_points --list

Steps are the trainer's own, of the 12B's 18-layer slice on one, two and four GPUs and of the whole 12B on two and four
(`train_step.py`). Several GPUs run under torchrun; all points of a number of GPUs run one after the other in the same
processes. Without `--points` it measures what this machine has the GPUs for. `key=value` changes every point: with a
tiny model the command runs on CPU ranks, without figures of memory.

Peaks are torch.cuda.max_memory_allocated over the timed steps, which is what `plan/memory.py` counts; with CUDA graphs,
which allocate for all steps when they are captured, over everything before too. `gib_before` is what a point found
allocated. What Transformer Engine keeps from one point to the next, its stand-ins for the gradients of weights, the
planner counts too (`stand_ins_gib`); where much more was found, measure the points one by one.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.train_step import COMMON, SHAPES, device_name, peak_gib, write_corpus
from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.loader import DataLoader
from nemotron_train.data.run_data import open_run_data
from nemotron_train.engine.groups import Groups, process_groups
from nemotron_train.engine.user_buffers import user_buffers
from nemotron_train.plan.gpu_table import Gpu
from nemotron_train.plan.measured import choose_gpu
from nemotron_train.plan.memory import GIB, memory_gib_per_gpu, plan_memory
from nemotron_train.plan.run_plan import RunPlan, plan_run
from nemotron_train.plan.step_time import step_time
from nemotron_train.platform.device import Platform, choose_platform
from nemotron_train.platform.ranks import LaunchedRank, launched_rank
from nemotron_train.runtime import Runtime
from nemotron_train.step import train_step
from nemotron_train.trainer import build_runtime

WARMUP_STEPS, TIMED_STEPS = 2, 3
ALL_LAYERS_ALIKE = ("precision.bf16_first_layers=0", "precision.bf16_last_layers=0")


@dataclass(frozen=True)
class Point:
    """A configuration to compare the planner at."""

    gpus: int
    overrides: tuple[str, ...]  # beside those of all benchmarks of a step


def slice_point(precision: str, tokens: int, recompute: str = "none") -> Point:
    own = (f"precision={precision}", f"train.seq_length={tokens}", f"train.recompute={recompute}")
    return Point(1, (*SHAPES["slice"].overrides, *own))


def whole_point(gpus: int, *own: str) -> Point:
    """Two micro-batches a step: enough to see what accumulates, and short."""
    layout = (f"parallel=tensor_{gpus}", "train.global_batch_size=2")
    return Point(gpus, (*SHAPES["whole"].overrides, *layout, *own))


def shared_slice_point(gpus: int, precision: str, *own: str) -> Point:
    """Four micro-batches a step, so that layers are most of it."""
    layout = (f"parallel=tensor_{gpus}", "train.global_batch_size=4")
    return Point(gpus, (*SHAPES["slice"].overrides, *layout, f"precision={precision}", *own))


OVERLAP, GRAPHS = "parallel.overlap_tensor_comm=true", "train.cuda_graphs=true"
POINTS = {
    "slice_bf16_8k": slice_point("bf16", 8192),
    "slice_fp8_block_8k": slice_point("fp8_block", 8192),
    "slice_fp8_block_16k": slice_point("fp8_block", 16384),
    "slice_fp8_block_4k": slice_point("fp8_block", 4096),
    "slice_fp8_block_8k_selective": slice_point("fp8_block", 8192, "selective"),
    "slice_fp8_block_16k_full": slice_point("fp8_block", 16384, "full"),
    "slice_fp8_current_8k": slice_point("fp8_current", 8192),
    "whole_fp8_block_8k": whole_point(2, "precision=fp8_block"),
    "whole_bf16_8k_full": whole_point(
        2, "precision=bf16", *ALL_LAYERS_ALIKE, "train.recompute=full", "optim.gradients=fp32", "optim.moments=fp32"
    ),
    "whole4_fp8_block_8k": whole_point(4, "precision=fp8_block"),
    "whole4_fp8_block_8k_graphs": whole_point(4, "precision=fp8_block", GRAPHS),
    "shared2_bf16_8k": shared_slice_point(2, "bf16"),
    "shared2_bf16_8k_overlap": shared_slice_point(2, "bf16", OVERLAP),
    "shared2_fp8_current_8k": shared_slice_point(2, "fp8_current"),
    "shared2_fp8_current_8k_overlap": shared_slice_point(2, "fp8_current", OVERLAP),
    "shared4_bf16_8k": shared_slice_point(4, "bf16"),
    "shared4_bf16_8k_overlap": shared_slice_point(4, "bf16", OVERLAP),
    "shared4_fp8_block_8k": shared_slice_point(4, "fp8_block"),
    "shared4_fp8_block_8k_graphs": shared_slice_point(4, "fp8_block", GRAPHS),
    "shared4_fp8_current_8k": shared_slice_point(4, "fp8_current"),
    "shared4_fp8_current_8k_overlap": shared_slice_point(4, "fp8_current", OVERLAP),
}


@dataclass(frozen=True)
class Place:
    """Where the points run, and what they share."""

    me: LaunchedRank
    platform: Platform
    gpu: Gpu  # what is planned for
    corpus: Path
    overrides: tuple[str, ...]


def configure(point: Point, corpus: Path, overrides: Iterable[str]) -> RunConfig:
    places = (f"data.path={corpus}", f"run.dir={corpus / 'run'}", "data.max_epochs=1000000")
    return load_config([*COMMON, *point.overrides, *places, *overrides])


def measure_points(names: Sequence[str], place: Place, output: Path) -> list[dict[str, Any]]:
    """Measure points of as many GPUs as there are ranks; rank 0 writes a line for each as soon as it has it."""
    records = []
    plans = {
        name: plan_run(configure(POINTS[name], place.corpus, place.overrides), place.me.world_size) for name in names
    }
    layout = plans[names[0]].layout
    with process_groups(layout, place.platform, place.me, timeout_seconds=600, seed=1) as groups:
        for name, plan in plans.items():
            assert plan.layout == layout, "points of as many GPUs share their process groups"
            with user_buffers(plan):
                measured = measure_or_say_why_not(plan, place, groups)
            record = {"point": name, **planned_figures(plan, place), **measured}
            free_memory()
            records.append(record)
            if place.me.rank == 0:
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)
    return records


def planned_figures(plan: RunPlan, place: Place) -> dict[str, Any]:
    ranks, parts = plan_memory(plan), step_time(plan, plan.batches.segments[0], place.gpu)
    return {
        "device": f"{device_name()} x {place.me.world_size}",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "overrides": list(place.overrides),
        "planned_for": place.gpu.source,
        "planned_gib": memory_gib_per_gpu(ranks),
        "planned_parts_gib": ranks[0].in_gib(),
        "stand_ins_gib": ranks[0].gradient_stand_ins / GIB,
        "planned_ms": parts.total * 1e3,
        "planned_parts_ms": {name: seconds * 1e3 for name, seconds in asdict(parts).items()},
    }


def measure_or_say_why_not(plan: RunPlan, place: Place, groups: Groups) -> dict[str, Any]:
    """Return what was measured, or `error` where memory was not enough."""
    gib_before = torch.cuda.memory_allocated() / GIB if place.platform.is_cuda else None
    try:
        return {"gib_before": gib_before, **measure(plan, place, groups)}
    except torch.OutOfMemoryError as error:
        return {"gib_before": gib_before, "error": str(error).splitlines()[0]}


def measure(plan: RunPlan, place: Place, groups: Groups) -> dict[str, Any]:
    """Take some steps of the trainer: the median time of a step, and the peak of the slowest moment."""
    reset_peak(place.platform)
    run = build_runtime(plan, place.platform, groups)
    try:
        return time_steps(run, plan, place)
    finally:
        release(run)


def time_steps(run: Runtime, plan: RunPlan, place: Place) -> dict[str, Any]:
    platform, config = place.platform, plan.config
    seconds, losses = [], []
    start_gib = float("nan")
    with DataLoader(open_run_data(config).reader, run.share, plan.batches.global_batch_size_at) as loader:
        for number in range(WARMUP_STEPS + TIMED_STEPS):
            if number == WARMUP_STEPS:
                start_gib = peak_gib()
                if run.captured is None:
                    reset_peak(platform)
            batches = [next(loader) for _ in range(plan.batches.num_micro_batches_at(0))]
            platform.synchronize()
            began = time.perf_counter()
            losses.append(train_step(run, batches, config.lr.warmup_tokens).loss.loss)
            platform.synchronize()
            seconds.append(time.perf_counter() - began)
    step_seconds = statistics.median(seconds[WARMUP_STEPS:])
    return {
        "measured_gib": peak_gib() if platform.is_cuda else None,
        "measured_start_gib": start_gib if platform.is_cuda else None,  # building the model and the first steps
        "measured_ms": step_seconds * 1e3,
        "steps_ms": [round(spent * 1e3, 1) for spent in seconds],
        "tokens_per_second_per_gpu": plan.tokens_per_step / step_seconds / place.me.world_size,
        "losses": [round(loss, 3) for loss in losses],
    }


def reset_peak(platform: Platform) -> None:
    if platform.is_cuda:
        torch.cuda.reset_peak_memory_stats()


def release(run: Runtime) -> None:
    """Give back the large tensors of a run, whoever still refers to the run: hooks of its gradients refer to it in
    circles that go through C++."""
    run.close()
    tensors = [
        buffer_part
        for chunk in run.chunks
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        for buffer_part in (buffer.param_data, buffer.grad_data)
    ]
    for part in run.optimizer.chained_optimizers:
        tensors += [weight for group in part.optimizer.param_groups for weight in group["params"]]
        tensors += [state for states in part.optimizer.state.values() for state in states.values()]
    for chunk in run.chunks:
        tensors += list(chunk.parameters())
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()  # Transformer Engine's copies of the weights
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            tensor.untyped_storage().resize_(0)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(records: Sequence[dict[str, Any]]) -> None:
    """Print planned beside measured; a ratio above 1 is planned too much."""
    title = f"{records[0]['device']}, torch {records[0]['torch']}, planned for {records[0]['planned_for']}"
    table = Table(title=title)
    for column in ("point", "planned GiB", "measured", "ratio", "planned ms", "measured", "ratio", "found GiB"):
        table.add_column(column, justify="left" if column == "point" else "right")
    for record in records:
        row = [record["point"]]
        for unit, form in (("gib", ".2f"), ("ms", ".1f")):
            planned, measured = record[f"planned_{unit}"], record.get(f"measured_{unit}")
            row += [f"{planned:{form}}"]
            row += [f"{measured:{form}}", f"{planned / measured:.3f}"] if measured else ["-", "-"]
        before = record["gib_before"]
        row.append(record.get("error", "-" if before is None else f"{before:.2f}"))
        table.add_row(*row)
    Console(width=140).print(table)


def run_under_torchrun(gpus: int, names: Sequence[str], options: argparse.Namespace, corpus: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command += ["-m", "benchmarks.planner_points", "--points", ",".join(names), "--output", str(options.output)]
    command += ["--gpu", options.gpu, "--corpus", str(corpus), *options.overrides]
    if subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode:
        print(f"points of {gpus} GPUs failed: {' '.join(command)}", file=sys.stderr, flush=True)


def choose(text: str | None) -> list[str]:
    if text is None:
        return [name for name, point in POINTS.items() if point.gpus <= max(torch.cuda.device_count(), 1)]
    unknown = [name for name in text.split(",") if name not in POINTS]
    if unknown:
        raise SystemExit(f"There is no point {', '.join(unknown)}; there are {', '.join(POINTS)}.")
    return text.split(",")


def measure_all(names: Sequence[str], options: argparse.Namespace, corpus: Path) -> None:
    """Measure here what one process can; as a rank of a launch, what the launch is for."""
    overrides, me = tuple(options.overrides), launched_rank()
    if options.corpus is None:
        write_corpus(corpus, configure(POINTS[names[0]], corpus, overrides).model.vocab_size)
    for gpus in sorted({POINTS[name].gpus for name in names}):
        group = [name for name in names if POINTS[name].gpus == gpus]
        if gpus == me.world_size:
            place = Place(me, choose_platform(me), choose_gpu(options.gpu), corpus, overrides)
            measure_points(group, place, options.output)
        else:
            run_under_torchrun(gpus, group, options, corpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", metavar="A,B,C")
    parser.add_argument("--output", type=Path, default=Path("planner_points.jsonl"), metavar="FILE")
    parser.add_argument("--gpu", default="h200", metavar="h200|h100|FILE.json", help="what is planned for")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)  # for ranks: what the first process wrote
    parser.add_argument("--list", action="store_true")
    options, options.overrides = parser.parse_known_args()
    if options.list:
        for name, point in POINTS.items():
            print(f"{name:34}{point.gpus} GPU  {' '.join(point.overrides)}")
        return
    names, _ = choose(options.points), choose_gpu(options.gpu)  # a wrong name or table is refused at once
    if options.corpus is not None:
        measure_all(names, options, options.corpus)
        return
    options.output.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        measure_all(names, options, Path(folder))
    if options.output.exists():
        show([json.loads(line) for line in options.output.read_text(encoding="utf-8").splitlines()])


if __name__ == "__main__":
    main()
