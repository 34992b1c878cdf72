"""Is a device, a network or a disk that does wrong found out? The wrong is put in through a parameter."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_train.doctor.bandwidth import check_bandwidth
from nemotron_train.doctor.compute import check_gemms, check_scan
from nemotron_train.doctor.findings import Finding, Status
from nemotron_train.doctor.measurements import Amounts, check_gpus, measure_together
from nemotron_train.doctor.storage import check_storage
from nemotron_train.ops.ssd import ssd
from nemotron_train.platform.device import Platform
from nemotron_train.platform.ranks import launched_rank
from tests.ranks import RankPool

CPU = torch.device("cpu")


def test_a_right_product_and_scan_are_well() -> None:
    """Fails if rounding is taken for a fault."""
    (product,) = check_gemms([CPU])
    scan = check_scan(CPU)
    assert (product.status, scan.status) == (Status.ok, Status.ok)
    assert "TFLOP/s" in product.found
    assert "differs by" in scan.found


@pytest.mark.parametrize("error", [1.0, 2.0**-10])
def test_one_wrong_entry_of_a_product_is_found(error: float) -> None:
    """Fails if a flipped bit in one of a quarter of a million sums is lost in a tolerance."""

    def product_with_a_fault(a: Tensor, b: Tensor) -> Tensor:
        c = a @ b
        c[37, 11] += error
        return c

    (finding,) = check_gemms([CPU], product_with_a_fault)
    assert finding.forbids_training
    assert "1 rows of a product are wrong" in finding.found
    assert finding.fix


@pytest.mark.parametrize("part", range(6))
def test_a_wrong_gradient_of_the_scan_is_found(part: int) -> None:
    """Fails if only the output is compared, or a gradient of one of the six inputs is left out."""

    def scan_with_a_fault(*inputs: Tensor) -> Tensor:
        inputs[part].register_hook(lambda gradient: gradient * 1.001)
        return ssd(*inputs, chunk_size=32)

    finding = check_scan(CPU, scan_with_a_fault)
    assert finding.forbids_training, finding


def test_what_fails_is_told_and_not_raised() -> None:
    """Fails if a full GPU, or a kernel that does not compile, ends the doctor before its other findings are told."""

    def failing(*inputs: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available")

    for finding in (check_scan(CPU, failing), *check_gemms([CPU], failing)):
        assert finding.forbids_training
        assert "no kernel image" in finding.found


def test_missing_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a node that lost all its GPUs is taken for a CPU machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_gpus(0).status in (Status.skipped, Status.wrong)
    lost = check_gpus(8)
    assert lost.forbids_training
    assert lost.found == "none, expected 8"


def damaged(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    return bytes(data)


def test_a_folder_that_gives_back_other_bytes_is_wrong(tmp_path: Path) -> None:
    """Fails if only speed is looked at; or if something is left in the folder."""
    assert {finding.status for finding in check_storage(tmp_path, 2)} <= {Status.ok, Status.slow}
    wrong = [finding for finding in check_storage(tmp_path, 2, damaged) if finding.status is Status.wrong]
    assert [finding.found for finding in wrong] == ["what was read is not what was written"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    """Fails if the doctor dies of what it should report."""
    (finding,) = check_storage(tmp_path / "nowhere", 1)
    assert finding.forbids_training
    assert "cannot be written" in finding.found


def examine_together(folder: str) -> list[Finding]:
    own = [Finding("place", Status.ok, os.environ["RANK"])]
    return measure_together(launched_rank(), Path(folder), own, Amounts(storage_megabytes=2, all_reduce_megabytes=3))


def test_two_ranks_measure_what_lies_between_them(ranks: RankPool, tmp_path: Path) -> None:
    """Fails if ranks do not meet, disagree on the outcome, or each look at a folder of their own."""
    first, second = ranks.run(examine_together, 2, str(tmp_path))
    assert first == second
    by_check = {finding.check: finding for finding in first}
    reduced = by_check["all-reduce over 2 ranks (gloo)"]
    assert reduced.status is Status.ok
    assert "GB/s of bus bandwidth, 3 MB in" in reduced.found
    assert {f"matrix product on {CPU}", f"state-space scan on {CPU}", f"storage of {tmp_path}", "place"} <= set(
        by_check
    )


def reduce_with_a_fault(rank_of_fault: int) -> Finding:
    me = launched_rank()
    dist.init_process_group("gloo", rank=me.rank, world_size=me.world_size)

    def all_reduce(tensor: Tensor) -> Any:
        dist.all_reduce(tensor)
        if me.rank == rank_of_fault:
            tensor[12_345] += 1

    try:
        return check_bandwidth(Platform(CPU, "gloo"), ranks_per_node=2, megabytes=1, all_reduce=all_reduce)
    finally:
        dist.destroy_process_group()


def test_a_sum_that_arrives_damaged_is_found(ranks: RankPool) -> None:
    """Fails if speed alone is measured."""
    healthy, sick = ranks.run(reduce_with_a_fault, 2, 1)
    assert (healthy.status, sick.status) == (Status.ok, Status.wrong)
    assert sick.found == "1 of 250000 sums are wrong"
