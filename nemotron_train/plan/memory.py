"""How much memory does a GPU need: what every pipeline rank holds at its fullest moment, in bytes that torch counts.

Derived from the code (see `activations.py`), not fitted. It meets what was measured on H200s within 4 %: 21 points of
the 12B and its 18-layer slice on one to four GPUs, in bf16 and FP8, of 4k to 16k tokens, with and without recomputation
(`benchmarks/README.md`); and Megatron-Core's own 12B, where AdamW's step is the fullest moment. Pipelines and context
parallelism have not been measured, and what is in none of the sums below (user buffers, what CUDA graphs leave to
nobody else) is arithmetic. The graphs themselves are not counted.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from nemotron_train.config.schema import ModelSection, PrecisionFormat, PrimaryWeights, StateFormat
from nemotron_train.plan.activations import head_activations, layer_activations, state_bytes, weight_bytes
from nemotron_train.plan.measured import OUTSIDE_TORCH_GIB
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.pipeline_schedule import most_in_flight
from nemotron_train.plan.precision_map import Gemm
from nemotron_train.plan.rank_share import share_of_rank, tokens_on_rank
from nemotron_train.plan.run_plan import RunPlan
from nemotron_train.plan.sizes import (
    attention_parameters,
    mamba_parameters,
    mlp_parameters,
    norm_parameters,
    position_parameters,
)

GIB = 2**30
FP8_COPIES_BYTES = 2  # a weight is kept by rows and by columns
ADAMW_ELEMENTS_AT_ONCE = 2**28  # whose moments, stored in bf16, are there in float32 during an update: 2 GiB


class _Weight(NamedTuple):
    """A linear layer's weight on one rank."""

    inputs: int
    outputs: int
    in_fp8: bool


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank (of each of its tensor-, context- and data-parallel ranks). The sums are what torch
    counts as allocated."""

    weights: int
    gradients: int
    master_weights: int  # this data-parallel rank's shard
    moments: int  # the same
    fp8_weights: int  # copies that Transformer Engine keeps over a step
    gradient_stand_ins: int  # one for every shape of weight, which Transformer Engine hands to autograd
    activations: int  # of all micro-batches in flight
    working: int  # on top of them: logits, or one layer's backward pass
    optimizer_working: int  # of AdamW's step, when there are no activations
    # In none of the sums:
    user_buffers: int  # what tensor-parallel ranks exchange through (engine/user_buffers.py)
    beside_graphs: int  # of AdamW and evaluation, which cannot use what CUDA graphs keep for the passes

    @property
    def held(self) -> int:
        """Return what is there at any time after the first step."""
        names = ("weights", "gradients", "master_weights", "moments", "fp8_weights", "gradient_stand_ins")
        return sum(getattr(self, name) for name in names)

    @property
    def forward_backward_peak(self) -> int:
        return self.held + self.activations + self.working

    @property
    def peak(self) -> int:
        return max(self.forward_backward_peak, self.held + self.optimizer_working)

    def in_gib(self) -> dict[str, float]:
        """Return every part and the peak, for people and programs."""
        parts = {field.name: round(getattr(self, field.name) / GIB, 2) for field in fields(self)}
        return {**parts, "peak": round(self.peak / GIB, 2)}


def plan_memory(plan: RunPlan) -> list[RankMemory]:
    """Count every pipeline rank at the fullest step: of longer samples, or of more micro-batches in flight."""
    batches, gemms = plan.batches, plan.gemms
    taken = {
        (segment.seq_length, batches.num_micro_batches_at(segment.start_tokens))
        for segment, steps in batches.steps_by_segment()
        if steps
    }
    fullest = []
    for rank in range(plan.layout.pipeline):
        weights = _gemms_of(plan, rank, gemms)
        counted = [_rank_memory(plan, rank, weights, *length_and_number) for length_and_number in sorted(taken)]
        fullest.append(max(counted, key=lambda memory: memory.peak + memory.beside_graphs))
    return fullest


def memory_gib_per_gpu(ranks: Iterable[RankMemory]) -> float:
    """Return the peak of the fullest rank, as torch.cuda.max_memory_allocated counts it."""
    return max(rank.peak for rank in ranks) / GIB


def outside_torch_gib(ranks: Sequence[RankMemory]) -> float:
    """Return what torch does not count; it is the same on all ranks."""
    return OUTSIDE_TORCH_GIB + ranks[0].user_buffers / GIB


def needed_gib(ranks: Sequence[RankMemory]) -> float:
    """Return what a GPU must have: the peak, what CUDA graphs leave to nobody else, and what torch does not count."""
    return outside_torch_gib(ranks) + max(rank.peak + rank.beside_graphs for rank in ranks) / GIB


def _rank_memory(plan: RunPlan, rank: int, gemms: Sequence[_Weight], seq_length: int, micro_batches: int) -> RankMemory:
    config, layout = plan.config, plan.layout
    parameters = rank_parameters(plan, rank)
    shards = layout.data * layout.context  # the optimizer is split over both
    dense = weight_bytes(config.precision.format)
    low = StateFormat.bf16 in (config.optim.gradients, config.optim.moments)
    fp32 = config.precision.format is PrecisionFormat.fp32
    shapes = {(weight.inputs, weight.outputs) for weight in gemms}
    fp8_primary = config.precision.primary_weights is PrimaryWeights.fp8
    masters = 2 if low and not fp8_primary else 4
    step = 0
    if config.optim.moments is StateFormat.bf16:  # both in float32, a part at a time or one tensor
        largest = max([ADAMW_ELEMENTS_AT_ONCE, *(weight.inputs * weight.outputs for weight in gemms)])
        step += 8 * min(largest, parameters // shards)
    if fp8_primary and config.optim.gradients is StateFormat.bf16:
        step += 4 * parameters // shards  # gradients in float32, where the other AdamW takes them as they are
    moments = 2 * state_bytes(config.optim.moments)
    working = _working(plan, rank, seq_length)
    return RankMemory(
        weights=rank_weight_bytes(plan, rank),
        gradients=parameters * state_bytes(config.optim.gradients),
        # Float32 weights are their own masters; AdamW for low-precision states keeps only the 16 bits that bf16 lacks,
        # unless the weights are FP8.
        master_weights=0 if fp32 else parameters * masters // shards,
        moments=parameters * moments // shards,
        # FP8 weights are themselves the copy by rows.
        fp8_weights=_quantised(gemms) * (FP8_COPIES_BYTES - fp8_primary),
        gradient_stand_ins=0 if fp32 else dense * sum(inputs * outputs for inputs, outputs in shapes),
        activations=_activations(plan, rank, seq_length, micro_batches),
        working=working,
        optimizer_working=step,
        user_buffers=_user_buffers(plan, seq_length),
        beside_graphs=max(step, working) if config.train.cuda_graphs else 0,
    )


def _user_buffers(plan: RunPlan, seq_length: int) -> int:
    """Return the bytes of Transformer Engine's user buffers, each as large as the activations of a tensor-parallel
    group: 8 that gather, in the layers' precision, and 4 that scatter, in bfloat16."""
    config = plan.config
    if not config.parallel.overlap_tensor_comm:
        return 0
    elements = tokens_on_rank(config, seq_length).layer * config.model.hidden_size
    fp8, bf16 = bool(plan.fp8_layers), len(plan.fp8_layers) < len(plan.layers)
    return elements * (fp8 * (8 + 4 * 2) + bf16 * (8 + 4) * 2)


def rank_fp8_weights(plan: RunPlan, rank: int) -> int:
    """Count the elements of a rank's weights that are multiplied in FP8."""
    return _quantised(_gemms_of(plan, rank, plan.gemms))


def rank_weight_bytes(plan: RunPlan, rank: int) -> int:
    """Return the bytes of a rank's weights, as they are gathered after every update."""
    precision = plan.config.precision
    dense = weight_bytes(precision.format)
    size = rank_parameters(plan, rank) * dense
    if precision.primary_weights is PrimaryWeights.fp8:
        size -= (dense - 1) * rank_fp8_weights(plan, rank)
    return size


def rank_parameters(plan: RunPlan, rank: int) -> int:
    """Count the parameters on one rank of a pipeline stage."""
    model, layout = plan.config.model, plan.layout
    share = share_of_rank(model, layout.tensor)
    total = sum(_layer_parameters(plan.layers[layer], share) for chunk in plan.chunks_of(rank) for layer in chunk)
    vocabulary = model.vocab_size // layout.tensor * model.hidden_size
    first, last = rank == 0, rank == layout.pipeline - 1
    if first:
        total += vocabulary + position_parameters(model)
    if last:
        total += norm_parameters(model, model.hidden_size)
        total += 0 if model.tied_embeddings and first else vocabulary  # tied on two stages: a copy on each
    return total


def _layer_parameters(kind: LayerKind, share: ModelSection) -> int:
    count = {
        LayerKind.mamba: mamba_parameters,
        LayerKind.attention: attention_parameters,
        LayerKind.mlp: mlp_parameters,
    }
    return count[kind](share)


def _count_kinds(plan: RunPlan, chunk: range) -> Counter[tuple[LayerKind, bool]]:
    """Count the layers of a chunk by kind and by whether they are in FP8."""
    return Counter((plan.layers[layer], layer in plan.fp8_layers) for layer in chunk)


def _activations(plan: RunPlan, rank: int, seq_length: int, micro_batches: int) -> int:
    kept = []
    for chunk in plan.chunks_of(rank):
        kinds = _count_kinds(plan, chunk).items()
        kept.append(sum(count * layer_activations(*kind, plan.config, seq_length).kept for kind, count in kinds))
    if rank == plan.layout.pipeline - 1:
        kept[-1] += head_activations(plan.config, seq_length).kept
    return most_in_flight(kept, plan.layout.pipeline, rank, micro_batches)


def _working(plan: RunPlan, rank: int, seq_length: int) -> int:
    """Return the largest of: a layer's backward pass, the logits, the gradient of the embedding."""
    kinds = {kind for chunk in plan.chunks_of(rank) for kind in _count_kinds(plan, chunk)}
    layers = [layer_activations(*kind, plan.config, seq_length) for kind in kinds]
    needs = [layer.recomputed + layer.working for layer in layers]
    if rank == plan.layout.pipeline - 1:
        needs.append(head_activations(plan.config, seq_length).working)
    if rank == 0 and plan.layout.pipeline > 1:
        model = plan.config.model
        vocabulary = model.vocab_size // plan.layout.tensor * model.hidden_size
        needs.append(vocabulary * weight_bytes(plan.config.precision.format))
    return max(needs)


def _gemms_of(plan: RunPlan, rank: int, gemms: Sequence[Gemm]) -> list[_Weight]:
    """Return the weights of a rank's linear layers."""
    here = {f"decoder.layers.{layer}" for chunk in plan.chunks_of(rank) for layer in chunk}
    if rank == plan.layout.pipeline - 1:
        here.add("output_layer")
    tp_size = plan.layout.tensor
    return [_Weight(*gemm.on_rank(tp_size), gemm.in_fp8) for gemm in gemms if gemm.name.rsplit(".", 2)[0] in here]


def _quantised(gemms: Iterable[_Weight]) -> int:
    return sum(weight.inputs * weight.outputs for weight in gemms if weight.in_fp8)
