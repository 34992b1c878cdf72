"""`python -m nemotron_train.probe FILE.json`: what does this machine's GPU take for the parts of a step?

Writes a table for `python -m nemotron_train.plan ... gpu=FILE.json`, in a minute or two; `plan --probe` starts it. It
measures the layers of Nemotron Nano 12B v2 on one GPU. Where there are more, it starts itself under torchrun on two,
which add what splitting layers costs and how fast the two reach each other.
"""

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from nemotron_train.engine.groups import process_groups
from nemotron_train.errors import EXIT_FAILED, ConfigError, NemotronTrainError
from nemotron_train.plan.gpu_table import gpu_from
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import Platform, choose_platform
from nemotron_train.platform.ranks import LaunchedRank, launched_rank
from nemotron_train.probe import two_gpus
from nemotron_train.probe.chunks import Bench, free_memory, probed_config
from nemotron_train.probe.table import enter_all, measure_one_gpu, note_two_gpus, write_table

TIMEOUT_SECONDS = 600
MEASUREMENTS_OF_ONE, MEASUREMENTS_OF_TWO = 25, 4
console = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the table, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        if len(arguments) != 1 or not arguments[0].endswith(".json"):
            raise ConfigError("Which file shall be written? python -m nemotron_train.probe FILE.json")
        probe(Path(arguments[0]))
    except NemotronTrainError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return 0


def probe(file: Path) -> None:
    me = launched_rank()
    if me.world_size > 2:
        raise ConfigError(f"The probe measures one GPU or two, and {me.world_size} ranks were started.")
    refuse_without_gpu()
    platform = choose_platform(me)
    if me.world_size == 2:
        probe_two(file, me, platform)
        return
    config = probed_config()
    layout = plan_run(config, 1).layout
    with (
        process_groups(layout, platform, me, timeout_seconds=TIMEOUT_SECONDS, seed=1) as groups,
        progress_bar("one GPU", MEASUREMENTS_OF_ONE) as tell,
    ):
        table = measure_one_gpu(Bench(config, platform, groups), tell)
    write_table(table, file)
    free_memory()
    if torch.cuda.device_count() > 1:
        start_two(file)
    console.print(f"Wrote {file}: python -m nemotron_train.plan experiment=NAME gpu={file}", soft_wrap=True)


def refuse_without_gpu() -> None:
    """Raise ConfigError where there is no GPU, or not what trains on it."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "--probe measures a GPU, and torch finds none here (torch.cuda.is_available() is false). Run it on the "
            "machine that will train, and give its file to the planner anywhere: gpu=FILE.json."
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            '--probe needs Transformer Engine, which is not installed (pip install "nemotron-train[gpu]").'
        )


def probe_two(file: Path, me: LaunchedRank, platform: Platform) -> None:
    """Complete the table in `file` as one of two ranks."""
    if not file.exists():
        raise ConfigError(f"Two ranks complete a table, and there is no {file}. Start the probe without a launcher.")
    table = json.loads(file.read_text(encoding="utf-8"))
    config = probed_config("parallel=tensor_2")
    layout = plan_run(config, 2).layout
    with (
        process_groups(layout, platform, me, timeout_seconds=TIMEOUT_SECONDS, seed=1) as groups,
        progress_bar("two GPUs", MEASUREMENTS_OF_TWO, is_shown=me.rank == 0) as tell,
    ):
        bench = Bench(config, platform, groups)
        enter_all(table, two_gpus.measurements(bench, table, lambda tree: gpu_from(tree, file, "the table")), tell)
    note_two_gpus(table)
    if me.rank == 0:
        write_table(table, file)


def start_two(file: Path) -> None:
    """Run this program on two GPUs; if they cannot be measured, the table stays as it is, with its notes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if subprocess.run([*command, "-m", "nemotron_train.probe", str(file)], check=False).returncode:
        console.print("Two GPUs could not be measured; for them the table has the shipped figures.")


@contextmanager
def progress_bar(title: str, total: int, *, is_shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a bar on the console; yields what is told the measurement that begins."""
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, disable=not is_shown) as bar:
        task = bar.add_task(title, total=total + 1)

        def tell(key: str) -> None:
            bar.update(task, description=f"{title}: {key}", advance=1)

        yield tell
        bar.update(task, description=title, completed=total + 1)


if __name__ == "__main__":
    sys.exit(main())
