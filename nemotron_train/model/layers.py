"""The three layer kinds of the pattern. Each normalises its input inside its first projection and adds its output to
the residual, normed and scaled again where the model asks for it."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemotron_train.config.schema import ROPE_BASE, ModelSection, PositionEmbedding, QkvNorm
from nemotron_train.engine.layer_parts import LayerParts
from nemotron_train.engine.plain_layers import make_norm_weight
from nemotron_train.engine.rotary import rotary_angles
from nemotron_train.model.mamba2_mixer import Mamba2Mixer
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.implementations import Operations
from nemotron_train.plan.pattern import LayerKind

# Shapes: S sequence (of a context-parallel rank: its part), s this rank's part of it, B micro-batch, D hidden, h heads,
# g query groups, P head dim; h and g are this rank's share.


class ResidualLayer(MegatronModule):
    """What is the same for all kinds: how a layer's output gets into the residual."""

    def __init__(self, config: TransformerConfig, model: ModelSection, parts: LayerParts) -> None:
        super().__init__(config)
        self.output_norm = self.layer_scale = None
        if model.output_norm:
            self.output_norm = parts.norm(config, config.hidden_size, config.layernorm_epsilon)
        if model.layer_scale is not None:
            self.layer_scale = make_norm_weight(config, config.hidden_size)

    def add_to(self, x_sBD: Tensor, out_sBD: Tensor, bias_D: Tensor | None = None) -> Tensor:
        if bias_D is not None:
            out_sBD = out_sBD + bias_D
        if self.output_norm is not None:
            out_sBD = self.output_norm(out_sBD)
        if self.layer_scale is not None:
            out_sBD = out_sBD * self.layer_scale
        return x_sBD + out_sBD


class MambaLayer(ResidualLayer):
    def __init__(
        self,
        config: TransformerConfig,
        model: ModelSection,
        parts: LayerParts,
        operations: Operations,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, model, parts)
        self.mixer = Mamba2Mixer(config, model, parts, operations, groups)

    def forward(self, x_sBD: Tensor, documents: Documents | None = None) -> Tensor:
        return self.add_to(x_sBD, self.mixer(x_sBD, documents))


class NormedValuesAttention(SelfAttention):
    """Megatron-Core's attention, which can norm queries and keys, with a norm of the values."""

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, *args: Any, **options: Any
    ) -> None:
        super().__init__(config, submodules, *args, **options)
        self.v_layernorm = submodules.k_layernorm(config, self.val_hidden_size, config.layernorm_epsilon)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query_SBhP, key_SBgP, value_SBgP = super().get_query_key_value_tensors(*args, **kwargs)
        return query_SBhP, key_SBgP, self.v_layernorm(value_SBgP)


class AttentionLayer(ResidualLayer):
    def __init__(
        self,
        config: TransformerConfig,
        model: ModelSection,
        layer_number: int,
        parts: LayerParts,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, model, parts)
        norms_values = model.qkv_norm is QkvNorm.qkv
        head_norm = None if model.qkv_norm is QkvNorm.none else parts.norm
        submodules = SelfAttentionSubmodules(
            linear_qkv=parts.column_linear if norms_values else parts.norm_column_linear,
            core_attention=parts.core_attention,
            linear_proj=parts.row_linear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        )
        attention = NormedValuesAttention if norms_values else SelfAttention
        self.self_attention = attention(
            config, submodules, layer_number, attn_mask_type=AttnMaskType.causal, pg_collection=groups
        )
        self.rope_base: float | None = None
        if model.position_embedding is PositionEmbedding.rope:
            self.rope_base = model.rope_base or ROPE_BASE
        self.cp_group, self.tp_size = groups.cp, groups.tp.size()

    def forward(self, x_sBD: Tensor, documents: Documents | None = None) -> Tensor:
        out_sBD, bias_D = self.self_attention(
            x_sBD, attention_mask=None, rotary_pos_emb=self._rotary_angles(x_sBD), packed_seq_params=documents
        )
        return self.add_to(x_sBD, out_sBD, bias_D)

    def _rotary_angles(self, x_sBD: Tensor) -> Tensor | None:
        if self.rope_base is None:
            return None
        length = len(x_sBD) * (self.tp_size if self.config.sequence_parallel else 1)
        return rotary_angles(self.rope_base, self.config.kv_channels, length, self.cp_group)


class MlpLayer(ResidualLayer):
    def __init__(
        self, config: TransformerConfig, model: ModelSection, parts: LayerParts, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config, model, parts)
        submodules = MLPSubmodules(linear_fc1=parts.norm_column_linear, linear_fc2=parts.row_linear)
        self.mlp = MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)

    def forward(self, x_sBD: Tensor, documents: Documents | None = None) -> Tensor:
        out_sBD, bias_D = self.mlp(x_sBD)  # takes each token by itself
        return self.add_to(x_sBD, out_sBD, bias_D)


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
        return AttentionLayer(config, model, number + 1, parts, groups)  # Megatron-Core counts layers from 1
    return MlpLayer(config, model, parts, groups)
