"""RunPlan -> this rank's model chunks, with their initial weights."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from nemotron_train.engine.layer_parts import LayerParts
from nemotron_train.model.hybrid_model import ChunkPlace, HybridModel
from nemotron_train.model.init import initialize_weights
from nemotron_train.ops.implementations import Operations
from nemotron_train.plan.run_plan import RunPlan


def build_model_chunks(
    plan: RunPlan, config: TransformerConfig, parts: LayerParts, operations: Operations, groups: ProcessGroupCollection
) -> list[HybridModel]:
    """Build the chunks this rank holds, one per virtual pipeline stage, in order."""
    chunks = []
    for place in chunk_places(plan, groups.pp.rank()):
        chunk = HybridModel(config, plan.config, place, parts, operations, groups)
        initialize_weights(
            chunk,
            plan.config.model,
            seed=plan.config.run.seed,
            num_layers=len(plan.layers),
            tp_rank=groups.tp.rank(),
            tp_size=groups.tp.size(),
        )
        chunks.append(chunk)
    return chunks


def chunk_places(plan: RunPlan, pp_rank: int) -> list[ChunkPlace]:
    """The places of pipeline rank `pp_rank`'s chunks: every pipeline_size-th range of layers."""
    layout = plan.layout
    places = []
    for virtual_stage in range(layout.virtual_pipeline):
        index = virtual_stage * layout.pipeline + pp_rank
        layers = plan.chunks[index]
        places.append(
            ChunkPlace(
                first_layer=layers.start,
                kinds=plan.layers[layers.start : layers.stop],
                virtual_stage=virtual_stage if layout.virtual_pipeline > 1 else None,
                is_first=index == 0,
                is_last=index == len(plan.chunks) - 1,
            )
        )
    return places
