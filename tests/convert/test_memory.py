"""How much memory do conversions take? Measured by the kernel, on a model many times larger than what may be held."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nemotron_train.checkpoint.stored_weights import StoredWeights
from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.export_hf import ExportRequest, export_hugging_face
from nemotron_train.convert.import_hf import import_hugging_face
from nemotron_train.convert.merge import merge_checkpoints
from nemotron_train.convert.new_run import parameter_shapes, write_new_run
from tests.random_checkpoints import random_checkpoint
from tests.ranks import RankPool

MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h
SHARD_BYTES = 16_000_000
SMALL = ModelSection("M-M*", 32, 64, 4, 2, 8, 8, 8, 4, 8, vocab_size=96)
# 94 MiB of float32; its largest tensors, of the MLPs, have 8 MiB.
LARGE = ModelSection("M-M-M-M*", 512, 4096, 8, 2, 64, 16, 64, 8, 16, vocab_size=4096)
LARGEST, ALLOWANCE = 8 * MIB, 4 * MIB  # the latter for the interpreter's own


def of_process(what: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return by how much the process grew, at most, while it worked. Memory that was free before counts as growth."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = of_process("VmRSS")
    work()
    return of_process("VmHWM") - before


def measure(folder: Path) -> dict[str, int]:
    """Run each conversion on a small model, which loads what it imports, and then, measured, on the large one."""
    # Give every tensor memory of its own that goes back when it is freed: the C library does so from 32 MiB on, which
    # tensors of real models exceed.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    contents = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(LARGE).items()}

    def write(name: str) -> torch.Tensor:
        return torch.rand(contents[name].shape)

    quiet, peaks = Console(quiet=True), {}
    small = random_checkpoint(folder / "small", SMALL)
    large = write_new_run(folder / "large", LARGE, dict.fromkeys(contents, torch.float32), write, {})
    for size, checkpoint in (("small", small), ("large", large)):
        request = ExportRequest(checkpoint=checkpoint, output=folder / f"{size}-hf", max_shard_bytes=SHARD_BYTES,
                                tolerance=1e-4, skip_parity="it needs the whole model")  # fmt: skip
        peaks["export"] = peak_bytes(lambda request=request: export_hugging_face(request, quiet))
        run_dir = folder / f"{size}-imported"
        peaks["import"] = peak_bytes(
            lambda size=size, run_dir=run_dir: import_hugging_face(folder / f"{size}-hf", run_dir, quiet)
        )
        pair = (checkpoint, run_dir / "checkpoints" / "step_000000000", 0.5, folder / f"{size}-merged")
        peaks["merge"] = peak_bytes(lambda pair=pair: merge_checkpoints(*pair, quiet))
    stored = StoredWeights(large)
    sizes = [stored.num_bytes(name) for name in stored.names]
    return {
        **peaks,
        "largest": max(sizes),
        "all": sum(sizes),
        "shards": len(list((folder / "large-hf").glob("*.safetensors"))),
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_conversions_hold_a_shard_or_a_few_tensors(tmp_path: Path) -> None:
    """Fails if an export holds more than one file of weights and 1.2 times the largest tensor, or an import or a merge
    more than a few tensors."""
    # What other tests left free would count, and they would go on with this one's settings of the C library.
    alone = RankPool()
    try:
        (found,) = alone.run(measure, 1, tmp_path)
    finally:
        alone.close()
    assert found["largest"] == LARGEST
    assert found["all"] > 5 * SHARD_BYTES
    assert found["shards"] > 5
    assert found["export"] <= SHARD_BYTES + 1.2 * LARGEST + ALLOWANCE
    assert found["import"] <= 3 * LARGEST + ALLOWANCE
    assert found["merge"] <= 5 * LARGEST + ALLOWANCE  # one of each, both in float32, and their mixture
    assert found["export"] > LARGEST, "what is measured is not the conversion"
