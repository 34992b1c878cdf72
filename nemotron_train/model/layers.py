"""The three layer kinds of the pattern. Each normalises its input inside its first projection and adds its output to
the residual."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemotron_train.config.schema import ModelSection
from nemotron_train.engine.layer_parts import LayerParts
from nemotron_train.model.mamba2_mixer import Mamba2Mixer
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.implementations import Operations
from nemotron_train.plan.pattern import LayerKind

# Shapes: s this rank's part of the sequence, B micro-batch, D hidden.


class MambaLayer(MegatronModule):
    def __init__(
        self,
        config: TransformerConfig,
        model: ModelSection,
        parts: LayerParts,
        operations: Operations,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.mixer = Mamba2Mixer(config, model, parts, operations, groups)

    def forward(self, x_sBD: Tensor, documents: Documents | None = None) -> Tensor:
        return x_sBD + self.mixer(x_sBD, documents)


class AttentionLayer(MegatronModule):
    def __init__(
        self, config: TransformerConfig, layer_number: int, parts: LayerParts, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        submodules = SelfAttentionSubmodules(
            linear_qkv=parts.norm_column_linear, core_attention=parts.core_attention, linear_proj=parts.row_linear
        )
        self.self_attention = SelfAttention(
            config, submodules, layer_number, attn_mask_type=AttnMaskType.causal, pg_collection=groups
        )

    def forward(self, x_sBD: Tensor, documents: Documents | None = None) -> Tensor:
        out_sBD, _ = self.self_attention(x_sBD, attention_mask=None, packed_seq_params=documents)
        return x_sBD + out_sBD


class MlpLayer(MegatronModule):
    def __init__(self, config: TransformerConfig, parts: LayerParts, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        submodules = MLPSubmodules(linear_fc1=parts.norm_column_linear, linear_fc2=parts.row_linear)
        self.mlp = MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)

    def forward(self, x_sBD: Tensor, documents: Documents | None = None) -> Tensor:
        out_sBD, _ = self.mlp(x_sBD)  # takes each token by itself
        return x_sBD + out_sBD


def build_layer(
    kind: LayerKind,
    number: int,
    config: TransformerConfig,
    model: ModelSection,
    parts: LayerParts,
    operations: Operations,
    groups: ProcessGroupCollection,
) -> MegatronModule:
    """Build layer `number` (0-based, over the whole model) of the given kind."""
    if kind is LayerKind.mamba:
        return MambaLayer(config, model, parts, operations, groups)
    if kind is LayerKind.attention:
        return AttentionLayer(config, number + 1, parts, groups)  # Megatron-Core counts layers from 1
    return MlpLayer(config, parts, groups)
