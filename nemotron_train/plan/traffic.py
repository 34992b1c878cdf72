"""How long do ranks talk to each other? Bytes of each kind of collective over the bandwidth between its ranks.

Bandwidths are those that large collectives reach, by the GPU's table (`gpu_table.py`): in the shipped one
measured within a node, assumed between nodes.
"""

from nemotron_train.config.schema import RunConfig
from nemotron_train.plan.activations import state_bytes, weight_bytes
from nemotron_train.plan.gpu_table import Gpu
from nemotron_train.plan.layout import Layout
from nemotron_train.plan.measured import GPUS_PER_NODE
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.rank_share import share_of_rank, tokens_on_rank

# With sequence parallelism a layer's input is gathered forward and again for the weight gradient, its output scattered,
# and the gradients of both go the other way. Without it, an all-reduce forward and one backward are as much as four of
# these.
SEQUENCE_PARALLEL_COLLECTIVES, ALL_REDUCE_COLLECTIVES = 5, 4


def tensor_parallel_seconds(config: RunConfig, layout: Layout, seq_length: int, gpu: Gpu) -> float:
    """Return the traffic of one layer and micro-batch, forward and backward; nothing overlaps it."""
    if layout.tensor == 1:
        return 0.0
    tokens, parallel = tokens_on_rank(config, seq_length), config.parallel
    whole = tokens.layer * config.model.hidden_size * weight_bytes(config.precision.format)
    collectives = SEQUENCE_PARALLEL_COLLECTIVES if parallel.sequence_parallel else ALL_REDUCE_COLLECTIVES
    return collectives * _ring(whole, layout.tensor) / _bandwidth(layout.tensor, 1, gpu)


def context_parallel_seconds(kind: LayerKind, config: RunConfig, layout: Layout, seq_length: int, gpu: Gpu) -> float:
    """Return the traffic of one layer and micro-batch: a Mamba mixer trades tokens for heads and back, attention passes
    keys and values around; both go the other way in the backward pass."""
    size = layout.context
    if size == 1 or kind is LayerKind.mlp:
        return 0.0
    tokens, share = tokens_on_rank(config, seq_length).layer, share_of_rank(config.model, layout.tensor)
    dense = weight_bytes(config.precision.format)
    if kind is LayerKind.mamba:
        inner = share.mamba_num_heads * share.mamba_head_dim
        packed = 2 * inner + 2 * share.mamba_num_groups * share.mamba_state_dim + share.mamba_num_heads
        sent = 2 * _ring(tokens * (packed + inner) * dense, size)
    else:
        keys_and_values = 2 * share.num_query_groups * share.attention_head_dim
        sent = 3 * (size - 1) * tokens * keys_and_values * dense  # backward they travel with their gradients
    return sent / _bandwidth(layout.tensor * size, layout.tensor, gpu)


def pipeline_seconds(config: RunConfig, layout: Layout, seq_length: int, gpu: Gpu) -> float:
    """Return sending one micro-batch's hidden state to the next stage and its gradient back."""
    if layout.pipeline == 1:
        return 0.0
    sent = tokens_on_rank(config, seq_length).residual * config.model.hidden_size
    sent *= 2 * weight_bytes(config.precision.format)
    inside_node = layout.world_size <= GPUS_PER_NODE
    return sent / (1e9 * (gpu.node_gb_per_s if inside_node else gpu.network_gb_per_s))


def gradient_seconds(config: RunConfig, layout: Layout, parameters: int, gpu: Gpu) -> float:
    """Return reducing the gradients of a rank's parameters into its shard."""
    return _data_parallel(parameters * state_bytes(config.optim.gradients), layout, gpu)


def weight_seconds(layout: Layout, size: int, gpu: Gpu) -> float:
    """Return gathering a rank's weights, of `size` bytes, from the shards that the optimizer updated."""
    return _data_parallel(size, layout, gpu)


def _data_parallel(size: int, layout: Layout, gpu: Gpu) -> float:
    ranks = layout.data * layout.context
    return _ring(size, ranks) / _bandwidth(layout.tensor * ranks, layout.tensor, gpu) if ranks > 1 else 0.0


def _ring(size: float, ranks: int) -> float:
    """Return what every rank sends of `size` bytes that all gather, scatter or exchange."""
    return size * (ranks - 1) / ranks


def _bandwidth(span: int, stride: int, gpu: Gpu) -> float:
    """Return bytes a second for each rank of groups that span so many neighbouring GPUs, `stride` apart.

    Beyond a node every ring crosses the network once a node: members of a group in one node share the load of their
    adapters.
    """
    if span <= GPUS_PER_NODE:
        return 1e9 * gpu.node_gb_per_s
    members_in_node = max(GPUS_PER_NODE // stride, 1)
    return 1e9 * min(gpu.node_gb_per_s, members_in_node * gpu.network_gb_per_s)
