"""What a parameter's name says about it: how tensor parallelism splits it, whether weights decay, how it starts.

One table for initialisation, the optimizer, checkpoints and conversion. Names are those of Megatron-Core 0.16's hybrid
model with Transformer Engine layers, with the global layer number: `decoder.layers.3.mixer.in_proj.weight`.
"""

from dataclasses import dataclass
from enum import Enum

from nemotron_train.config.schema import ModelSection


class Start(Enum):
    """Initial values; `model/init.py` has the formulas."""

    normal = "normal"
    residual = "residual"  # normal, scaled down: the projection writes to the residual stream
    ones = "ones"
    zeros = "zeros"
    layer_scale = "layer_scale"  # model.layer_scale
    conv = "conv"
    dt_bias = "dt_bias"
    a_log = "a_log"


@dataclass(frozen=True)
class ParameterRule:
    split_dim: int | None  # the dimension split over tensor-parallel ranks; None: every rank has the whole
    decays: bool  # whether weight decay applies
    start: Start
    float32: bool = False  # kept in float32 whatever the precision: acts through an exponential, or is tiny
    parts: str = ""  # rows that are several matrices one under the other, each split by itself: letters of `part_rows`


_RULES: dict[str, ParameterRule] = {
    "word_embeddings.weight": ParameterRule(0, True, Start.normal),
    "output_layer.weight": ParameterRule(0, True, Start.normal),
    "position_embeddings.weight": ParameterRule(None, True, Start.normal),
    "final_norm.weight": ParameterRule(None, False, Start.ones),
    "final_norm.bias": ParameterRule(None, False, Start.zeros),
    "layer_norm_weight": ParameterRule(None, False, Start.ones),
    "layer_norm_bias": ParameterRule(None, False, Start.zeros),
    "output_norm.weight": ParameterRule(None, False, Start.ones),
    "output_norm.bias": ParameterRule(None, False, Start.zeros),
    "layer_scale": ParameterRule(None, False, Start.layer_scale),
    "mixer.in_proj.weight": ParameterRule(0, True, Start.normal, parts="zxBCd"),
    "mixer.conv1d.weight": ParameterRule(0, True, Start.conv, parts="xBC"),
    "mixer.conv1d.bias": ParameterRule(0, False, Start.conv, parts="xBC"),
    "mixer.dt_bias": ParameterRule(0, False, Start.dt_bias, float32=True),
    "mixer.A_log": ParameterRule(0, False, Start.a_log, float32=True),
    "mixer.D": ParameterRule(0, False, Start.ones, float32=True),
    "mixer.norm.weight": ParameterRule(0, False, Start.ones),
    "mixer.out_proj.weight": ParameterRule(1, True, Start.residual),
    "self_attention.linear_qkv.weight": ParameterRule(0, True, Start.normal),
    "self_attention.linear_qkv.bias": ParameterRule(0, False, Start.zeros),
    "self_attention.q_layernorm.weight": ParameterRule(None, False, Start.ones),
    "self_attention.q_layernorm.bias": ParameterRule(None, False, Start.zeros),
    "self_attention.k_layernorm.weight": ParameterRule(None, False, Start.ones),
    "self_attention.k_layernorm.bias": ParameterRule(None, False, Start.zeros),
    "self_attention.v_layernorm.weight": ParameterRule(None, False, Start.ones),
    "self_attention.v_layernorm.bias": ParameterRule(None, False, Start.zeros),
    "self_attention.linear_proj.weight": ParameterRule(1, True, Start.residual),
    "self_attention.linear_proj.bias": ParameterRule(None, False, Start.zeros),
    "mlp.linear_fc1.weight": ParameterRule(0, True, Start.normal),
    "mlp.linear_fc1.bias": ParameterRule(0, False, Start.zeros),
    "mlp.linear_fc2.weight": ParameterRule(1, True, Start.residual),
    "mlp.linear_fc2.bias": ParameterRule(None, False, Start.zeros),
}

PART_NAMES = {"z": "z", "x": "x", "B": "B", "C": "C", "d": "dt"}  # letter -> Megatron-Core's suffix in a checkpoint


def rule_for(name: str) -> ParameterRule:
    """Find the rule of a parameter, whatever wraps the model (a prefix such as `module.` does not matter)."""
    for ending, rule in _RULES.items():
        if name.endswith(ending):
            return rule
    raise KeyError(f"model/names.py has no rule for the parameter {name!r}")


def part_rows(parts: str, model: ModelSection, tp_size: int = 1) -> list[int]:
    """Rows of each packed part on one of `tp_size` ranks, in order."""
    d_inner = model.mamba_num_heads * model.mamba_head_dim
    group_rows = model.mamba_num_groups * model.mamba_state_dim
    rows = {"z": d_inner, "x": d_inner, "B": group_rows, "C": group_rows, "d": model.mamba_num_heads}
    return [rows[part] // tp_size for part in parts]
