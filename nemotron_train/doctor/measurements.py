"""What can be measured once torch is there: compute, network and storage of this machine, or of all ranks together."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nemotron_train.doctor.bandwidth import check_bandwidth
from nemotron_train.doctor.compute import check_gemms, check_scan
from nemotron_train.doctor.findings import Finding, Status, merge
from nemotron_train.doctor.storage import check_storage
from nemotron_train.errors import ConfigError
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import LaunchedRank

MEETING_SECONDS = 300
DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Amounts:
    """How much is moved. Small amounts tell that something works, large ones how fast."""

    storage_megabytes: int
    all_reduce_megabytes: int


FULL_GPU, FULL_CPU = Amounts(1024, 1000), Amounts(256, 20)
QUICK = Amounts(64, 0)


def has_cuda() -> bool:
    return torch.cuda.is_available()


def check_gpus(expected: int) -> Finding:
    """Compare what torch can use with what this machine must have; a GPU that torch cannot use is wrong as well."""
    found = torch.cuda.device_count() if has_cuda() else 0
    name = f"{found} ({torch.cuda.get_device_name(0)})" if found else "none"
    if found < expected:
        fix = (
            "See nvidia-smi and dmesg (Xid) on this machine, and CUDA_VISIBLE_DEVICES; leave the node out (--exclude)."
        )
        return Finding("GPUs", Status.missing, f"{name}, expected {expected}", fix)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not found and not hidden and DRIVER.exists():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        fix = f"{built}: install one that fits the driver (nvidia-smi), or hide the GPUs with CUDA_VISIBLE_DEVICES=."
        return Finding("GPUs", Status.wrong, "there, but torch cannot use them", fix)
    return Finding("GPUs", Status.ok if found else Status.skipped, name if found else "none: runs are on the CPU")


def measure_node(folder: Path) -> list[Finding]:
    """Look at every GPU of this machine (at the CPU where there is none) and at the folder; takes seconds."""
    return [*check_gemms(all_devices()), *check_storage(folder, QUICK.storage_megabytes)]


def all_devices() -> list[torch.device]:
    """Every GPU of this machine, else its CPU."""
    return [torch.device("cuda", n) for n in range(torch.cuda.device_count())] or [torch.device("cpu")]


def measure_alone(folder: Path) -> list[Finding]:
    """As `measure_node`, with the scan and more of storage."""
    amounts = FULL_GPU if has_cuda() else FULL_CPU
    devices = all_devices()
    together = "start the doctor under torchrun or srun to measure it"
    return [
        *check_gemms(devices),
        check_scan(devices[0]),
        Finding("all-reduce", Status.skipped, together, required=False),
        *check_storage(folder, amounts.storage_megabytes),
    ]


def measure_together(
    me: LaunchedRank, folder: Path, findings: list[Finding], amounts: Amounts | None = None
) -> list[Finding]:
    """Measure on all ranks at once, and between them.

    Args:
        findings: what this rank has found so far.
        amounts: instead of what suits the device.

    Returns:
        on every rank the worst of what all ranks found.
    """
    try:
        platform = choose_platform(me)
        dist.init_process_group(
            platform.backend,
            rank=me.rank,
            world_size=me.world_size,
            timeout=timedelta(seconds=MEETING_SECONDS),
            device_id=platform.device if platform.is_cuda else None,
        )
    except (RuntimeError, ValueError, ConfigError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        fix = f"{where} must be reachable from every node, and one GPU there for each rank (see launch/env.sh)."
        return [*findings, Finding("ranks", Status.wrong, f"do not meet: {str(error).splitlines()[0]}", fix)]
    amounts = amounts or (FULL_GPU if platform.is_cuda else FULL_CPU)
    findings = [*findings, *check_gemms([platform.device]), check_scan(platform.device)]
    hosts: list[str] = [""] * me.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    per_node = max(hosts.count(host) for host in hosts)
    findings.append(check_bandwidth(platform, ranks_per_node=per_node, megabytes=amounts.all_reduce_megabytes))
    if me.local_rank == 0:
        findings += check_storage(folder, amounts.storage_megabytes)
    of_all: list[list[Finding]] = [[]] * me.world_size
    dist.all_gather_object(of_all, findings)
    dist.destroy_process_group()
    return merge(of_all, [f"rank {rank} on {host}" for rank, host in enumerate(hosts)])
