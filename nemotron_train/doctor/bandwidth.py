"""How fast do ranks reach each other? An all-reduce of every rank, as the gradients of a step need it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_train.doctor.compute import seconds_of
from nemotron_train.doctor.findings import Finding, Status
from nemotron_train.platform.device import Platform

# GB/s of bus bandwidth below which something is amiss (our choice): NVLink of a Hopper node gives about 350 to 450, a
# node with eight 400 Gb/s adapters about as much between nodes, and TCP sockets in place of InfiniBand a few.
MIN_GBS_IN_NODE, MIN_GBS_BETWEEN_NODES = 200.0, 40.0


def check_bandwidth(
    platform: Platform, *, ranks_per_node: int, megabytes: int, all_reduce: Callable[[Tensor], object] = dist.all_reduce
) -> Finding:
    """Time an all-reduce over all ranks of the default process group; call on every rank.

    Bus bandwidth is 2 (n-1)/n bytes / time: what each link carries in a ring, comparable over numbers of ranks (as in
    nccl-tests).
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    check = f"all-reduce over {ranks} ranks ({platform.backend})"
    tensor = torch.full((megabytes * 250_000,), float(rank + 1), device=platform.device)
    all_reduce(tensor)
    expected = ranks * (ranks + 1) / 2  # exact in float32
    num_wrong = int((tensor != expected).sum())
    tensor.zero_()
    seconds = seconds_of(lambda: all_reduce(tensor), platform.device, repeats=5)  # by all ranks, whatever they found
    if num_wrong:
        fix = "Data arrives damaged. Take the node or its network adapter out of use; NCCL_DEBUG=INFO names the path."
        return Finding(check, Status.wrong, f"{num_wrong} of {tensor.numel()} sums are wrong", fix)
    gbs = 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size() / seconds / 1e9
    found = f"{gbs:.3g} GB/s of bus bandwidth, {megabytes} MB in {seconds * 1e3:.3g} ms"
    least = MIN_GBS_IN_NODE if ranks <= ranks_per_node else MIN_GBS_BETWEEN_NODES
    if platform.is_cuda and gbs < least:
        fix = (
            "Start with NCCL_DEBUG=INFO: it must speak of NVLink (P2P) within a node, and of IB or the provider's "
            f"network between nodes, not of Socket. Expected are at least {least:g} GB/s."
        )
        return Finding(check, Status.slow, found, fix, required=False)
    return Finding(check, Status.ok, found)
