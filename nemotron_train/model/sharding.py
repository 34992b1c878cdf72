"""How parameters of our own modules appear in a Megatron-Core sharded state dict."""

from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemotron_train.model.names import PART_NAMES, rule_for


def sharded_parameters(
    module: nn.Module, prefix: str, tp_group: torch.distributed.ProcessGroup, metadata: dict | None
) -> dict:
    """Shard the parameters of a module that is no parallel linear (those bring their own method), by `names.py`."""
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    own = {
        name: parameter
        for name, parameter in module.named_parameters()
        if not name.startswith(("in_proj.", "out_proj."))
    }
    split_dims = {name: rule.split_dim for name in own if (rule := rule_for(prefix + name)).split_dim is not None}
    return make_sharded_tensors_for_checkpoint(
        own, prefix, split_dims, (), tp_group=tp_group, dp_cp_group=metadata["dp_cp_group"]
    )


def shard_packed(whole: ShardedTensor, parts: str, rows: list[int]) -> ShardedTensorFactory:
    """Store a packed parameter as one tensor per part (`NAME.z`, `NAME.x`, …), which Megatron-Core also does for its
    optimizer state.

    Args:
        whole: this rank's packed shard.
        parts: letters of `names.PART_NAMES`, in order.
        rows: rows of each part on this rank.
    """
    template = whole.without_data()

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: tuple, flattened_range: slice | None) -> list[ShardedTensor]:
        packed = replace(
            template, key=key, data=tensor, dtype=tensor.dtype, replica_id=replica_id, flattened_range=flattened_range
        )
        shards, start = [], 0
        for part, count in zip(parts, rows, strict=True):
            for shard in packed.narrow(0, start, count):
                shard.key = f"{key}.{PART_NAMES[part]}"
                shards.append(shard)
            start += count
        return shards

    @torch.no_grad()
    def merge(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)

    return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)
