"""One pipeline chunk of the hybrid model: embedding (first chunk), its layers, final norm and output layer (last
chunk)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.config.schema import ModelSection, PositionEmbedding, Recompute, RunConfig
from nemotron_train.engine.layer_parts import LayerParts
from nemotron_train.engine.plain_layers import tied_output_linear
from nemotron_train.engine.sequence_exchange import own_places
from nemotron_train.model.layers import build_layer
from nemotron_train.ops.documents import Documents
from nemotron_train.ops.implementations import Operations
from nemotron_train.plan.pattern import LayerKind

# Shapes: S sequence, s this rank's part of it, B micro-batch, D hidden, v this rank's part of the vocabulary.


@dataclass(frozen=True)
class ChunkPlace:
    """Where a model chunk stands in the pipeline."""

    first_layer: int  # 0-based, over the whole model
    kinds: tuple[LayerKind, ...]  # of this chunk's layers
    virtual_stage: int | None  # None without interleaving
    is_first: bool
    is_last: bool


class NumberedLayers(nn.Module):
    """Layers stored under their number in the whole model, so that a parameter's name means the same on every pipeline
    stage."""

    def __init__(self, layers: dict[int, MegatronModule]) -> None:
        super().__init__()
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()  # Megatron-Core's schedules walk the layers

    def numbered(self) -> Iterator[tuple[int, nn.Module]]:
        return ((int(name), layer) for name, layer in self.named_children())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Ask every layer: Megatron-Core takes a module that cannot say how it is split for the same on all ranks."""
        state: dict = {}
        for number, layer in self.named_children():
            state.update(layer.sharded_state_dict(f"{prefix}{number}.", sharded_offsets, metadata))
        return state


class HybridStack(MegatronModule):
    """The layers of one chunk, and the final norm on the last one."""

    def __init__(
        self,
        config: TransformerConfig,
        run_config: RunConfig,
        place: ChunkPlace,
        parts: LayerParts,
        operations: Operations,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.recompute_layers = run_config.train.recompute is Recompute.full
        self.groups, self.parts = groups, parts
        layers = {}
        for number, kind in enumerate(place.kinds, start=place.first_layer):
            with parts.precision.build(number):
                layers[number] = build_layer(kind, number, config, run_config.model, parts, operations, groups)
        self.layers = NumberedLayers(layers)
        self.final_norm = None
        if place.is_last:
            self.final_norm = parts.norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, x_sBD: Tensor, documents: Documents | None = None) -> Tensor:
        recompute = self.recompute_layers and self.training and torch.is_grad_enabled()
        with self.parts.precision.stack(self.groups.tp_dp_cp):
            for number, layer in self.layers.numbered():
                take = partial(self._run_layer, number, layer, documents)
                x_sBD = self.parts.recompute(take, x_sBD, self.groups.tp) if recompute else take(x_sBD)
        return self.final_norm(x_sBD) if self.final_norm is not None else x_sBD

    def _run_layer(self, number: int, layer: nn.Module, documents: Documents | None, x_sBD: Tensor) -> Tensor:
        with self.parts.precision.layer(number, self.groups.tp_dp_cp):
            return layer(x_sBD, documents)


class HybridModel(LanguageModule):
    """A chunk as Megatron-Core's schedules expect it: input tensor from the previous chunk, loss per token from the
    last one."""

    def __init__(
        self,
        config: TransformerConfig,
        run_config: RunConfig,
        place: ChunkPlace,
        parts: LayerParts,
        operations: Operations,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder
        self.operations, self.tp_group, self.cp_group = operations, groups.tp, groups.cp
        self.keeps_fp8_state = parts.precision.whole_stack
        self.pre_process, self.post_process, self.vp_stage = place.is_first, place.is_last, place.virtual_stage
        self.share_embeddings_and_output_weights = run_config.model.tied_embeddings
        self.input_tensor: Tensor | None = None
        if place.is_first:
            self.embedding = _build_embedding(config, run_config.model, parts, groups)
        self.decoder = HybridStack(config, run_config, place, parts, operations, groups)
        if place.is_last:
            if run_config.model.tied_embeddings:
                self.output_layer = tied_output_linear(
                    config, run_config.model.vocab_size, groups.tp, holds_weight=not place.is_first
                )
            else:
                self.output_layer = parts.output_linear(config, run_config.model.vocab_size, groups.tp)
        if place.is_first or place.is_last:
            self.setup_embeddings_and_output_layer()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Leave out what Transformer Engine keeps beside parameters, so that a checkpoint does not tell which layers
        wrote it; only delayed scaling has something there to keep."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.keeps_fp8_state:
            return state
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `sharded_state_dict` leaves in; FP8 state that is not given stays as it is."""
        present = {key: value for key, value in self.state_dict().items() if key.endswith("_extra_state")}
        return super().load_state_dict({**present, **state_dict}, strict=strict, assign=assign)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Take the previous chunk's output; called by the pipeline schedule before each forward pass."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None, document_BS: Tensor | None = None) -> Tensor:
        """Run the chunk.

        Args:
            tokens_BS: token ids; only the first chunk reads them.
            labels_BS: next-token ids for the last chunk; without them it returns logits.
            document_BS: number of each token's document within its sample; with it no layer looks across documents.

        Returns:
            the hidden state x_sBD for the next chunk; from the last chunk loss_BS in nats per token (float32), or
            logits_BSv.
        """
        documents = None if document_BS is None else Documents(document_BS)
        if self.pre_process:
            positions = self._positions(tokens_BS, documents) if self.embedding.add_position_embedding else None
            x_sBD = self.embedding(input_ids=tokens_BS, position_ids=positions)
        else:
            assert self.input_tensor is not None, "the pipeline schedule sets the input of later chunks"
            x_sBD = self.input_tensor
        x_sBD = self.decoder(x_sBD, documents)
        if not self.post_process:
            return x_sBD
        tied = self.share_embeddings_and_output_weights
        weight = {"weight": self.shared_embedding_or_output_weight()} if tied else {}
        logits_SBv, _ = self.output_layer(x_sBD, **weight)
        if labels_BS is None:
            return logits_SBv.transpose(0, 1).contiguous()
        return self.operations.cross_entropy(logits_SBv, labels_BS.t(), self.tp_group).t()

    def _positions(self, tokens_BS: Tensor, documents: Documents | None) -> Tensor:
        """Return the place of each of this rank's tokens in its sample, or in its document where those are told
        apart."""
        seq_length = tokens_BS.shape[1] * self.cp_group.size()
        places_S = own_places(seq_length, self.cp_group, tokens_BS.device)
        return places_S[None] if documents is None else documents.positions_BS[:, places_S]


def _build_embedding(
    config: TransformerConfig, model: ModelSection, parts: LayerParts, groups: ProcessGroupCollection
) -> LanguageModelEmbedding:
    is_learned = model.position_embedding is PositionEmbedding.learned
    kind = LanguageModelEmbedding if model.tied_embeddings else parts.embedding
    embedding = kind(
        config,
        model.vocab_size,
        model.max_position_embeddings or 0,  # read only if they are learned
        position_embedding_type="learned_absolute" if is_learned else "none",
        tp_group=groups.tp,
    )
    if is_learned:  # Megatron-Core leaves them in float32 on the CPU
        embedding.position_embeddings.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
    return embedding
