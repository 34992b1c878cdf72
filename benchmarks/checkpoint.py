"""What does a checkpoint cost? `python -m benchmarks.checkpoint`, on the quickstart's model, one rank: how long
training stands still for a save beside it and for one that it waits for, and the time hashing takes of writing.

The model is built, takes one step's worth of state (moments are allocated) and is saved several times each way.
Medians are shown. No data is needed.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import xxhash
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemotron_train.checkpoint.background import BackgroundWriter
from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.checkpoint.store import commit_save, finish_save, gather_reports, start_save
from nemotron_train.config.load import load_config
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.optimizer import allocate_state
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.runtime import Progress, Runtime
from nemotron_train.trainer import build_runtime

BARS = {"stall": 0.20, "hashing": 0.10}


def measure(run: Runtime, repetitions: int) -> dict[str, list[float]]:
    """Save both ways in turns; returns seconds by what they were spent on."""
    seconds: dict[str, list[float]] = {name: [] for name in ("sync", "start", "fork", "beside", "gather", "commit")}
    step, agreed = 0, None
    for _ in track(range(repetitions), description="saves", transient=True):
        step += 1
        began = time.perf_counter()
        started = start_save(run, Progress(step=step), "", agreed=agreed)
        finish_save(started, started.write())
        seconds["sync"].append(time.perf_counter() - began)
        step += 1
        began = time.perf_counter()
        agreed = started.agreed
        started = start_save(run, Progress(step=step), "", agreed=agreed)
        planned = time.perf_counter()
        writer = BackgroundWriter(started.write, 0)
        forked = time.perf_counter()
        while writer.is_writing:
            time.sleep(0.001)
        done = time.perf_counter()
        reports = gather_reports(writer.report(60))
        gathered = time.perf_counter()
        commit_save(started, reports)
        for name, value in zip(
            ("start", "fork", "beside", "gather", "commit"),
            (planned - began, forked - planned, done - forked, gathered - done, time.perf_counter() - gathered),
            strict=True,
        ):
            seconds[name].append(value)
    return seconds


def measure_hashing(folder: Path, repetitions: int) -> tuple[float, float]:
    """Write a checkpoint's bytes again, with fsync, and hash them in memory; returns seconds of each."""
    contents = [(folder / name).read_bytes() for name in read_commit(folder).files]
    writing, hashing = [], []
    for _ in range(repetitions):
        began = time.perf_counter()
        for content in contents:
            with open(folder.parent / "again", "wb", buffering=0) as file:
                file.write(content)
                os.fsync(file.fileno())
        written = time.perf_counter()
        for content in contents:
            xxhash.xxh3_128_hexdigest(content)
        writing.append(written - began)
        hashing.append(time.perf_counter() - written)
    return statistics.median(writing), statistics.median(hashing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder when not given")
    arguments, overrides = parser.parse_known_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        config = load_config(["experiment=quickstart", *overrides])
        config = replace(config, run=replace(config.run, dir=folder))
        me = launched_rank()
        plan, platform = plan_run(config, me.world_size), choose_platform(me)
        with process_groups(plan.layout, platform, me, timeout_seconds=600, seed=1) as groups:
            run = build_runtime(plan, platform, groups)
            allocate_state(run.optimizer)
            measure(run, 1)
            for old in (Path(folder) / "checkpoints").iterdir():
                old.rename(old.with_suffix(".warm_up"))
            seconds = {name: statistics.median(values) for name, values in measure(run, arguments.repetitions).items()}
        checkpoint = Path(folder) / "checkpoints" / "step_000000001"
        megabytes = sum(file.size for file in read_commit(checkpoint).files.values()) / 1e6
        writing, hashing = measure_hashing(checkpoint, arguments.repetitions)
    stall = seconds["start"] + seconds["fork"] + seconds["gather"]
    table = Table(title=f"Saving {megabytes:.1f} MB, medians of {arguments.repetitions}")
    for column in ("what", "ms", "fraction", "bar"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, value in (
        ("save that training waits for", seconds["sync"]),
        ("  start: folder, facts", seconds["start"]),
        ("  start the writer", seconds["fork"]),
        ("  gather what was written", seconds["gather"]),
        ("  (the writer, a process beside training)", seconds["beside"]),
        ("  (the commit, a thread beside training)", seconds["commit"]),
    ):
        table.add_row(what, f"{1e3 * value:.1f}", "", "")
    for what, value, whole, bar in (
        ("stall of a save beside training", stall, seconds["sync"], BARS["stall"]),
        ("hashing, of writing with fsync", hashing, writing, BARS["hashing"]),
    ):
        table.add_row(what, f"{1e3 * value:.1f}", f"{value / whole:.1%}", f"{bar:.0%}")
    console.print(table)


if __name__ == "__main__":
    main()
