"""How does a run give the same bits every time? Nothing is left to the environment: what libraries read there is set.

On the CPU nothing here changes a bit. On a GPU libraries add up with atomic operations, and time several kernels to
pick one, unless they are told not to. They read these variables when they are imported or first used, so they are set
before the model is built. Read in the sources of Transformer Engine 2.11, Megatron-Core 0.16.1, mamba-ssm 2.3.2 and
causal-conv1d 1.6.2; our own Triton kernels have one configuration each and no atomics.
"""

import os

import torch
from torch.utils import deterministic as torch_deterministic

VARIABLES = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # attention's backward pass; Megatron-Core refuses to go on without
    "MAMBA_DETERMINISTIC": "1",  # sums of the published scan kernels, and one configuration each instead of a timed one
    "TRITON_CACHE_AUTOTUNING": "0",  # else they would keep timing, and go by what one machine has stored
    "CAUSAL_CONV1D_DETERMINISTIC": "1",  # gradients of the convolution's weight and bias
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # a workspace for every stream, as torch asks for
    "NCCL_ALGO": "Ring",  # sums in one order; with sequence parallelism and sharded optimizers it is what runs anyway
}


def set_determinism(asked: bool) -> None:
    """Make this process deterministic, or torch as it comes. Call it before anything computes on the GPU."""
    # Makes torch's own sums by index (losses by source) deterministic. It only warns of what has no such form, and
    # does not fill memory that will be written anyway.
    torch.use_deterministic_algorithms(asked, warn_only=True)
    torch_deterministic.fill_uninitialized_memory = False
    if asked:
        os.environ.update(VARIABLES)
