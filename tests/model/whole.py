"""Puts the tensor-parallel shards of a parameter together, written out by hand: it shares no code with `model/names.py`
or `take_shard`."""

import numpy as np

from nemotron_train.config.schema import ModelSection
from tests.engine.live import Arrays

COLUMN_SPLIT = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")
ROW_SPLIT = (
    "word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_fc1.weight", "linear_qkv.bias",
    "linear_fc1.bias",
    "mixer.norm.weight", "mixer.dt_bias", "mixer.A_log", "mixer.D",
)  # fmt: skip
WHOLE = (
    "layer_norm_weight", "layer_norm_bias", "final_norm.weight", "final_norm.bias", "layernorm.weight",
    "layernorm.bias", "output_norm.weight", "output_norm.bias", "layer_scale", "position_embeddings.weight",
    "linear_proj.bias", "linear_fc2.bias",
)  # fmt: skip


def join_ranks(ranks: list[Arrays], tp_size: int, model: ModelSection) -> Arrays:
    """What all ranks hold, as one rank would hold it. Tensor-parallel ranks are neighbours; each block of `tp_size`
    ranks is a pipeline stage."""
    joined: Arrays = {}
    for start in range(0, len(ranks), tp_size):
        stage = ranks[start : start + tp_size]
        for name in stage[0]:
            joined[name] = join_shards(name, [rank[name] for rank in stage], model)
    return joined


def join_shards(name: str, shards: list[np.ndarray], model: ModelSection) -> np.ndarray:
    if name.endswith(WHOLE):
        for shard in shards[1:]:
            # Not bitwise: each rank sums its own copy's gradient, in an order that may depend on where its memory lies.
            np.testing.assert_allclose(shard, shards[0], rtol=0, atol=1e-5 * np.abs(shards[0]).max(), err_msg=name)
        return shards[0]
    if name.endswith(COLUMN_SPLIT):
        return np.concatenate(shards, axis=1)
    if name.endswith(ROW_SPLIT):
        return np.concatenate(shards)
    inner, group_rows = model.mamba_num_heads * model.mamba_head_dim, model.mamba_num_groups * model.mamba_state_dim
    packed = [inner, group_rows, group_rows]  # x, B, C
    if name.endswith("in_proj.weight"):
        packed = [inner, *packed, model.mamba_num_heads]  # z, x, B, C, dt
    else:
        assert name.endswith(("conv1d.weight", "conv1d.bias")), name
    rows = [sum(packed[:end]) // len(shards) for end in range(1, len(packed))]
    parts = zip(*(np.split(shard, rows) for shard in shards), strict=True)
    return np.concatenate([piece for part in parts for piece in part])
