"""`python -m nemotron_train.doctor [--quick] [--format json] [--folder DIR]`: is this machine fit to train on?

Alone it looks at packages, devices and storage. Under torchrun or srun it also measures between all ranks, and rank 0
tells the worst of what any found. `--quick` takes seconds and always looks at this machine alone: the check before a
job starts. The exit code is 0 unless something without which nothing can be trained is missing or wrong.
"""

import argparse
import importlib.util
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from nemotron_train.doctor.findings import Finding, Status
from nemotron_train.doctor.versions import PACKAGES, Needed, check_packages, check_python
from nemotron_train.errors import EXIT_FAILED, ConfigError
from nemotron_train.platform.ranks import LaunchedRank, launched_rank


def main(argv: Sequence[str] | None = None) -> int:
    """Examine, tell, and return the exit code."""
    arguments = build_parser().parse_args(argv)
    me = LaunchedRank(rank=0, world_size=1, local_rank=0)
    try:
        if not arguments.quick:
            me = launched_rank()
        findings = examine(arguments.folder, me, quick=arguments.quick, num_gpus=arguments.gpus)
    except ConfigError as error:
        findings = [Finding("launch", Status.wrong, str(error), "Start with torchrun or launch/slurm/pretrain.sbatch.")]
    if me.rank == 0:
        tell(findings, arguments.format)
    return EXIT_FAILED if any(finding.forbids_training for finding in findings) else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemotron-doctor", description="Is this machine fit to train on?")
    option = parser.add_argument
    option("--quick", action="store_true", help="in seconds: versions, a product on every GPU, the folder")
    option("--gpus", type=int, default=0, metavar="N", help="GPUs this machine must have")
    option("--format", choices=("text", "json"), default="text", help="json: one object a line for each finding")
    option("--folder", type=Path, default=Path(), metavar="DIR", help="where runs write (default: the current folder)")
    return parser


def examine(folder: Path, me: LaunchedRank, *, quick: bool, num_gpus: int = 0) -> list[Finding]:
    """Look at everything; what needs a package that cannot be used is left out."""
    try_imports = not quick and me.local_rank == 0  # once a node
    always, cuda, optional = ([p for p in PACKAGES if p.needed is needed] for needed in Needed)
    findings = [check_python(), *check_packages(always, try_imports=try_imports)]
    try:
        from nemotron_train.doctor import measurements
    except (ImportError, OSError) as error:  # OSError: a shared library that torch loads
        return [*findings, _unusable_torch(error)]
    findings.append(measurements.check_gpus(num_gpus))
    if measurements.has_cuda():
        findings += check_packages(cuda, try_imports=try_imports)
    findings += check_packages(optional, try_imports=False)
    if quick:
        return [*findings, *measurements.measure_node(folder)]
    if me.world_size == 1:
        return [*findings, *measurements.measure_alone(folder)]
    return measurements.measure_together(me, folder, findings)


def _unusable_torch(error: Exception) -> Finding:
    fix = "Install torch first (bash launch/setup.sh), then look again: devices and storage were not measured."
    return Finding("torch can be used", Status.wrong, f"{type(error).__name__}: {error}", fix)


def tell(findings: Sequence[Finding], form: str) -> None:
    """Write the findings to standard output; without rich, as lines of JSON."""
    if form == "text" and importlib.util.find_spec("rich") is not None:
        from nemotron_train.doctor import table

        table.show(findings)
        return
    for finding in findings:
        sys.stdout.write(json.dumps({"host": socket.gethostname(), **finding.as_record()}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
