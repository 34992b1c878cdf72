"""The memory through which tensor-parallel ranks exchange activations while matrix products run.

Transformer Engine calls these user buffers: a product that gathers its input, or scatters its output, does so piece by
piece, and while one piece is multiplied the next is on its way between the GPUs of a node.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nemotron_train.plan.rank_share import tokens_on_rank
from nemotron_train.plan.run_plan import RunPlan


@contextmanager
def user_buffers(plan: RunPlan) -> Iterator[None]:
    """Hold the buffers for the length of a `with` block inside that of the process groups, where the plan asks for
    them. Layers that were built for them find them there at every pass.

    After an error they are left as they are, like the groups.
    """
    config = plan.config
    if not config.parallel.overlap_tensor_comm:
        yield
        return
    import transformer_engine.pytorch as te  # only GPU machines have it

    # Ranks map each other's memory with CUDA IPC. Transformer Engine would rather use NVLink multicast, and fails where
    # a machine has it but does not grant it.
    os.environ["UB_SKIPMC"] = "1"
    modes = [te.UserBufferQuantizationMode.FP8] if plan.fp8_layers else []
    if len(plan.fp8_layers) < len(plan.layers):
        modes.append(te.UserBufferQuantizationMode.NONE)
    te.initialize_ub(
        [tokens_on_rank(config, config.train.seq_length).layer, config.model.hidden_size],
        plan.layout.tensor,
        quantization_modes=modes,
        dtype=torch.bfloat16,
        bootstrap_backend="nccl",
    )
    yield
    te.destroy_ub()
