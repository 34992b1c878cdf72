"""Megatron-Core's own hybrid model on a CPU, as a program: it writes and reads checkpoints as a Megatron run does.

    python -m tests.convert.megatron_hybrid save FOLDER WEIGHTS.pt      random weights -> a checkpoint, and themselves
    python -m tests.convert.megatron_hybrid load FOLDER WEIGHTS.pt      a checkpoint -> the model's weights

Model, layers, mixer and checkpoint code are Megatron-Core's. It wants mamba-ssm, whose kernels never run here, and
Transformer Engine; stand-ins of the same parameters take their places. A process of its own, because the stand-ins must
be there before Megatron-Core is imported.
"""

# ruff: noqa: E402 (the stand-ins come first)
import queue
import sys
import types
from typing import Any

import torch
from torch import nn


class GatedNorm(nn.Module):
    """The parameters of mamba-ssm's."""

    def __init__(self, hidden_size: int, *, device: Any, dtype: Any, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))


def stand_in(name: str, **contents: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
    stand_in(package)
stand_in("mamba_ssm.ops.triton.selective_state_update", selective_state_update=None)
stand_in("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=GatedNorm)
stand_in("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=None, mamba_split_conv1d_scan_combined=None)

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm import mamba_block
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemotron_train.engine import plain_layers
from nemotron_train.engine.layer_parts import choose_layer_parts
from nemotron_train.engine.mcore_config import build_transformer_config
from nemotron_train.ops.implementations import operations
from nemotron_train.plan.run_plan import plan_run
from tests.convert.megatron_models import MODEL, config_of
from tests.engine.live import live_groups

mamba_block.TENorm = lambda config, hidden_size, eps: plain_layers.Norm(config, hidden_size, eps)
COLUMN, ROW = plain_layers.NormColumnParallelLinear, plain_layers.RowParallelLinear

# As `mamba_stack_spec` of megatron/core/models/mamba, with plain layers for those of Transformer Engine.
SPEC = ModuleSpec(
    module=MambaStack,
    submodules=MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                mixer=ModuleSpec(
                    module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=COLUMN, out_proj=ROW)
                ),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=COLUMN, core_attention=plain_layers.CausalAttention, linear_proj=ROW
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=COLUMN, linear_fc2=ROW)),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    ),
)  # fmt: skip


def main(action: str, folder: str, weights: str) -> None:
    config = config_of(folder)
    with live_groups(config) as (platform, groups):
        plan, ops = plan_run(config, 1), operations("torch")
        transformer_config = build_transformer_config(plan, ops, choose_layer_parts(plan, platform))
        model = MambaModel(
            transformer_config,
            SPEC,
            vocab_size=MODEL["vocab_size"],
            max_sequence_length=32,
            hybrid_override_pattern=MODEL["layer_pattern"],
            position_embedding_type="none",
            pg_collection=groups,
        )
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        state = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        if action == "save":
            filesystem_async._results_queue = queue.Queue()  # nothing else runs beside this save
            dist_checkpointing.save(state, folder)
        else:
            # Strict but for what linear layers keep beside their weights: Megatron-LM's --dist-ckpt-strictness.
            loaded = dist_checkpointing.load(state, folder, strict="log_unexpected")
            weights_of = {key: loaded[key] for key in state if key in loaded}  # beside them: what all ranks share
            missing, unexpected = model.load_state_dict(weights_of, strict=False)
            wrong = [key for key in (*missing, *unexpected) if not key.endswith("_extra_state")]
            assert not wrong, wrong
        torch.save({name: parameter.detach().clone() for name, parameter in model.named_parameters()}, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
