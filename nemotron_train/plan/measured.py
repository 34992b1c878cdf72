"""Which GPUs can a run be planned for, and what is assumed of machines beyond what tables hold?

The H200's table, `tables/h200.json`, is what was measured for this package; its notes say how. `--probe` writes one of
the same form for the machine at hand.
"""

from dataclasses import replace
from pathlib import Path

from nemotron_train.errors import ConfigError
from nemotron_train.plan.gpu_table import Gpu, read_gpu

H200_BANDWIDTH, H100_BANDWIDTH = 4.8, 3.35  # TB/s of memory, data sheets

H200 = replace(read_gpu(Path(__file__).parent / "tables" / "h200.json", "the shipped table"), name="H200")
H100 = replace(
    H200,
    name="H100",
    memory_gib=79.6,
    memory_slowdown=H200_BANDWIDTH / H100_BANDWIDTH,
    source="the shipped table of the H200, which has the same compute units, with kernels bound by memory slowed by "
    "the ratio of bandwidths: derived, nothing measured",
)
GPUS = {"h200": H200, "h100": H100}

GPUS_PER_NODE = 8
OUTSIDE_TORCH_GIB = 3.0  # CUDA context, libraries, NCCL's buffers: not in torch's count of allocated memory; assumed
# The norm reads the gradients, AdamW reads them, reads and writes masters and moments; masters are read into weights.
OPTIMIZER_BYTES_PER_PARAMETER = 38


def choose_gpu(text: str) -> Gpu:
    """Return the GPU of a name, or of a table's file.

    Raises:
        ConfigError: it is neither, or the table cannot be used.
    """
    if text in GPUS:
        return GPUS[text]
    if not text.endswith(".json"):
        raise ConfigError(f"gpu={text} is not one of {', '.join(GPUS)}, nor a table of --probe (gpu=FILE.json).")
    return read_gpu(Path(text), f"the table {text}")
