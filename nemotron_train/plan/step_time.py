"""How long does a step take, and the run? Layers, pipeline bubble, traffic and optimizer, added up.

What it rests on: times of single layers on one and two H200s (`tables/h200.json`); `--probe` writes such a table for
another card. Eleven configurations of the 12B and its 18-layer slice on one and two H200s took what it says within 7 %
(`benchmarks/README.md`); for four GPUs see `BEYOND_TWO_GPUS`. Pipelines, context parallelism and other models
have not been measured: there it is arithmetic. Left out: what `parallel.overlap_tensor_comm` hides (3 to 9 % of a step,
where it was measured), and adding up the gradient of tied embeddings over first and last stage.
"""

from dataclasses import dataclass

from nemotron_train.config.schema import PrecisionFormat, Recompute
from nemotron_train.plan.activations import state_bytes
from nemotron_train.plan.batching import BatchSegment
from nemotron_train.plan.gpu_table import Gpu
from nemotron_train.plan.layer_times import FORWARD_FRACTION, measured_format, stage_costs
from nemotron_train.plan.measured import H200, OPTIMIZER_BYTES_PER_PARAMETER
from nemotron_train.plan.memory import rank_fp8_weights, rank_parameters, rank_weight_bytes
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.pipeline_cut import StageCosts, chunk_costs
from nemotron_train.plan.pipeline_schedule import step_seconds
from nemotron_train.plan.run_plan import RunPlan
from nemotron_train.plan.traffic import (
    context_parallel_seconds,
    gradient_seconds,
    pipeline_seconds,
    tensor_parallel_seconds,
    weight_seconds,
)

SECONDS_PER_DAY = 86_400
BEYOND_TWO_GPUS = (
    "beyond two GPUs only tensor 4 was measured, on H200s: bf16 took 0.93 to 0.95 times what is planned; FP8 1.03 to "
    "1.44 times, by machine, waiting for the CPU to start its kernels; with train.cuda_graphs=true 0.88 to 0.94 times"
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest path through it."""

    layers: float  # all micro-batches of the pipeline rank that has most to do
    tensor_and_context: float  # traffic inside the layers of that rank
    bubble: float  # waiting for other ranks, above all while the pipeline fills and drains
    pipeline_traffic: float
    data_traffic: float  # gradients and weights that nothing hides
    optimizer: float  # norm of the gradients, AdamW, clearing where layers are recomputed, quantising new weights

    @property
    def total(self) -> float:
        return (
            self.layers
            + self.tensor_and_context
            + self.bubble
            + self.pipeline_traffic
            + self.data_traffic
            + self.optimizer
        )


@dataclass(frozen=True)
class RunTime:
    """The whole run, from the step times of each segment of its batch schedule."""

    first_step: StepTime
    tokens_per_second_per_gpu: float  # of the first step
    model_tflops_per_gpu: float  # the same
    days: float  # of training alone: no start, checkpoints, evaluation or failures
    gpu_hours: float


def has_times(format: PrecisionFormat) -> bool:
    """Return whether there are times for this precision: measured, or those of a format that stands for it."""
    return format is not PrecisionFormat.fp32


def plan_time(plan: RunPlan, gpu: Gpu = H200) -> RunTime:
    """Add up the run; `has_times` must hold for its precision."""
    world_size = plan.layout.world_size
    first = step_time(plan, plan.batches.segments[0], gpu)
    steps = [(segment, count) for segment, count in plan.batches.steps_by_segment() if count]
    times = (first if segment is plan.batches.segments[0] else step_time(plan, segment, gpu) for segment, _ in steps)
    seconds = sum(time.total * count for time, (_, count) in zip(times, steps, strict=True))
    tokens_per_second = plan.tokens_per_step / first.total / world_size
    return RunTime(
        first_step=first,
        tokens_per_second_per_gpu=tokens_per_second,
        model_tflops_per_gpu=tokens_per_second * plan.flops_per_token_at(0) / 1e12,
        days=seconds / SECONDS_PER_DAY,
        gpu_hours=seconds / 3600 * world_size,
    )


def step_time(plan: RunPlan, segment: BatchSegment, gpu: Gpu) -> StepTime:
    """Add up a step of `segment`."""
    config, layout, length = plan.config, plan.layout, segment.seq_length
    micro_batches = plan.batches.num_micro_batches_at(segment.start_tokens)
    compute = chunk_costs(plan.chunks, stage_costs(config, plan.pattern, length, gpu))
    traffic = chunk_costs(plan.chunks, _layer_traffic(plan, length, gpu))
    chunks = [a + b for a, b in zip(compute, traffic, strict=True)]
    slowest = max(range(layout.pipeline), key=lambda rank: sum(chunks[rank :: layout.pipeline]))
    its_chunks = slice(slowest, None, layout.pipeline)
    work = micro_batches * sum(chunks[its_chunks])
    parameters = max(rank_parameters(plan, rank) for rank in range(layout.pipeline))
    # Each boundary that a micro-batch passes, there and back; interleaved schedules overlap it.
    sends = micro_batches + layout.pipeline - 1 if layout.virtual_pipeline == 1 else layout.num_model_chunks - 1
    return StepTime(
        layers=micro_batches * sum(compute[its_chunks]),
        tensor_and_context=micro_batches * sum(traffic[its_chunks]),
        bubble=max(step_seconds(chunks, layout.pipeline, micro_batches) - work, 0.0) if layout.pipeline > 1 else 0.0,
        pipeline_traffic=sends * pipeline_seconds(config, layout, length, gpu),
        data_traffic=_exposed_data_traffic(plan, parameters, sum(chunks[its_chunks]), gpu),
        optimizer=_optimizer_seconds(plan, parameters, gpu),
    )


def _layer_traffic(plan: RunPlan, seq_length: int, gpu: Gpu) -> StageCosts:
    config, layout = plan.config, plan.layout
    tensor = tensor_parallel_seconds(config, layout, seq_length, gpu)
    by_kind = {kind: tensor + context_parallel_seconds(kind, config, layout, seq_length, gpu) for kind in LayerKind}
    return StageCosts(layers=tuple(by_kind[kind] for kind in plan.layers), first=0.0, last=0.0)


def _exposed_data_traffic(plan: RunPlan, parameters: int, micro_batch_seconds: float, gpu: Gpu) -> float:
    """Overlapped gradients hide behind the last backward pass, overlapped weights behind the first forward pass."""
    config, layout = plan.config, plan.layout
    gradients = gradient_seconds(config, layout, parameters, gpu)
    gathered = max(rank_weight_bytes(plan, rank) for rank in range(layout.pipeline))
    weights = weight_seconds(layout, gathered, gpu)
    if config.parallel.overlap_grad_reduce:
        gradients = max(gradients - (1 - FORWARD_FRACTION) * micro_batch_seconds, 0.0)
    if config.parallel.overlap_param_gather:
        weights = max(weights - FORWARD_FRACTION * micro_batch_seconds, 0.0)
    return gradients + weights


def _optimizer_seconds(plan: RunPlan, parameters: int, gpu: Gpu) -> float:
    """Update this rank's shard, clear its gradients where they are cleared, and quantise all its new weights in the
    first micro-batch; all bound by memory."""
    config, shards = plan.config, plan.layout.data * plan.layout.context
    spent = gpu.optimizer_ps_per_parameter * parameters / shards
    if config.train.recompute is Recompute.full:  # elsewhere the first micro-batch's gradients overwrite the old
        cleared = parameters * state_bytes(config.optim.gradients)
        spent += gpu.optimizer_ps_per_parameter * cleared / OPTIMIZER_BYTES_PER_PARAMETER
    fp8_weights = max(rank_fp8_weights(plan, rank) for rank in range(plan.layout.pipeline))
    if fp8_weights:
        spent += fp8_weights * gpu.first_pass_ps_per_weight[measured_format(config.precision.format)]
    return 1e-12 * spent * gpu.memory_slowdown
