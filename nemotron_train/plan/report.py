"""What does the plan command say beyond the banner: groups, phases, memory, time, cost and checkpoints of a run?

`report` is for people, `report_json` for programs.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from nemotron_train.errors import ConfigError
from nemotron_train.plan.activations import weight_bytes
from nemotron_train.plan.architecture_rules import beyond_nemotron_h
from nemotron_train.plan.describe import describe, summarize
from nemotron_train.plan.gpu_table import Gpu
from nemotron_train.plan.layout import Layout
from nemotron_train.plan.measured import GPUS_PER_NODE, H200
from nemotron_train.plan.memory import GIB, RankMemory, memory_gib_per_gpu, needed_gib, outside_torch_gib, plan_memory
from nemotron_train.plan.run_plan import RunPlan, plan_run
from nemotron_train.plan.step_time import BEYOND_TWO_GPUS, RunTime, has_times, plan_time

MEMORY_SOURCE = (
    "derived from what each layer keeps; within 4 % of 21 peaks measured with the 12B's layers on one to four H200s "
    "(bf16 and FP8, 4k to 16k tokens, with and without recomputation); pipelines, context parallelism and other models "
    "were not measured"
)
MEMORY_SOURCE_FP32 = "derived for layers that keep what Transformer Engine's do; nothing was measured in float32"
WORTH_SAYING = 0.02  # of a step: what is gained by less is lost in what the planner does not know
OPTIMIZER_FILE_BYTES = 12  # master weight and both moments of a parameter, in float32


@dataclass(frozen=True)
class Machine:
    """What the run is planned for."""

    gpu: Gpu = H200
    price_per_gpu_hour: float | None = None


def report(plan: RunPlan, machine: Machine) -> str:
    """Return the banner and what only planning needs."""
    ranks = plan_memory(plan)
    rows = [
        *_group_rows(plan.layout),
        *_phase_rows(plan),
        *_memory_rows(plan, ranks, machine.gpu),
        *_time_rows(plan, machine),
        *_checkpoint_rows(plan, machine),
    ]
    return "\n".join([describe(plan), *(f"{name:<11}{text}" for name, text in rows)])


def report_json(plan: RunPlan, machine: Machine) -> dict[str, Any]:
    """Return the same numbers under stable names; times are null where nothing was measured (float32)."""
    ranks = plan_memory(plan)
    timed = _time(plan, machine)
    return {
        **summarize(plan),
        "bf16_gemms": bf16_gemms(plan),
        "phases": [
            {
                "start_tokens": phase.start_tokens,
                "first_step": plan.batches.step_at(plan.batches.step_at_or_after(phase.start_tokens)),
                "weights": {weight.source: weight.weight for weight in phase.weights},
            }
            for phase in plan.config.data.phases
        ],
        "gpu": machine.gpu.name,
        "times_from": machine.gpu.source,
        "memory_gib_per_gpu": round(memory_gib_per_gpu(ranks), 2),
        "memory_gib_of_gpu": machine.gpu.memory_gib,
        "memory_gib_needed": round(needed_gib(ranks), 2),
        "fits": needed_gib(ranks) <= machine.gpu.memory_gib,
        "memory_by_pipeline_rank": [rank.in_gib() for rank in ranks],
        "step_seconds": timed and timed.first_step.total,
        "step_seconds_by_part": timed and asdict(timed.first_step),
        "tokens_per_second_per_gpu": timed and timed.tokens_per_second_per_gpu,
        "model_tflops_per_gpu": timed and timed.model_tflops_per_gpu,
        "days": timed and timed.days,
        "gpu_hours": timed and timed.gpu_hours,
        "price": timed and _price(timed, machine),
        "checkpoint_bytes": checkpoint_bytes(plan),
        "weights_bytes": _weights_bytes(plan),
    }


def bf16_gemms(plan: RunPlan) -> list[str]:
    """Return the linear layers of the pattern that run in bf16, from input to output. The output layer, which no format
    covers, is not among them."""
    if weight_bytes(plan.config.precision.format) != 2:
        return []
    return [gemm.name for gemm in plan.gemms if not gemm.in_fp8 and gemm.name != "output_layer"]


def checkpoint_bytes(plan: RunPlan) -> int:
    """Return the size of a checkpoint: weights, and the optimizer's float32 state."""
    return _weights_bytes(plan) + OPTIMIZER_FILE_BYTES * plan.sizes.parameters


def _weights_bytes(plan: RunPlan) -> int:
    return weight_bytes(plan.config.precision.format) * plan.sizes.parameters


def _time(plan: RunPlan, machine: Machine) -> RunTime | None:
    return plan_time(plan, machine.gpu) if has_times(plan.config.precision.format) else None


def _price(timed: RunTime, machine: Machine) -> float | None:
    return None if machine.price_per_gpu_hour is None else timed.gpu_hours * machine.price_per_gpu_hour


def _group_rows(layout: Layout) -> list[tuple[str, str]]:
    """Return who talks to whom: the groups of rank 0."""
    strides = {
        "tensor": (layout.tensor, 1),
        "context": (layout.context, layout.tensor),
        "data": (layout.data, layout.tensor * layout.context),
        "pipeline": (layout.pipeline, layout.tensor * layout.context * layout.data),
    }
    groups = []
    for name, (size, stride) in strides.items():
        if size == 1:
            continue
        ranks = [str(index * stride) for index in range(size)]
        text = ", ".join(ranks if size <= 4 else [*ranks[:3], "...", ranks[-1]])
        inside = "" if (size - 1) * stride < GPUS_PER_NODE else ", across nodes"
        groups.append(f"{name} {text}{inside}")
    return [("groups", f"of rank 0: {'; '.join(groups)}")] if groups else []


def _phase_rows(plan: RunPlan) -> list[tuple[str, str]]:
    starts = [phase.start_tokens for phase in plan.config.data.phases if phase.start_tokens]
    reached = [start for start in starts if start < plan.batches.consumed_at_end]
    steps = (plan.batches.step_at(plan.batches.step_at_or_after(start)) for start in reached)
    texts = [
        f"{start:,} tokens = step {step:,} ({start / plan.config.train.train_tokens:.4g} of the run)"
        for start, step in zip(reached, steps, strict=True)
    ]
    return [("phases" if not index else "", f"another blend from {text}") for index, text in enumerate(texts)]


def _memory_rows(plan: RunPlan, ranks: list[RankMemory], gpu: Gpu) -> list[tuple[str, str]]:
    fullest = max(range(len(ranks)), key=lambda rank: ranks[rank].peak + ranks[rank].beside_graphs)
    parts = ranks[fullest].in_gib()
    verdict = "fits" if needed_gib(ranks) <= gpu.memory_gib else "DOES NOT FIT"
    counted = {name: size for name, size in parts.items() if name not in ("peak", "user_buffers", "beside_graphs")}
    held = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in counted.items() if size)
    when = "in AdamW's step" if ranks[fullest].forward_backward_peak < ranks[fullest].peak else "in a backward pass"
    beside = f"{parts['beside_graphs']:.1f} beside the CUDA graphs, " if ranks[fullest].beside_graphs else ""
    rows = [
        (
            "memory",
            f"{parts['peak']:.1f} GiB at most, {when}, {beside}and about {outside_torch_gib(ranks):.3g} outside torch: "
            f"{verdict} into {gpu.name}'s {gpu.memory_gib:g} GiB",
        ),
        ("", held),
    ]
    if beside:
        grow = "layers and micro-batches" if len(ranks) > 1 else "layers"
        rows.append(("", f"not counted: the graphs themselves, which grow with {grow}"))
    if len(ranks) > 1:
        peaks = ", ".join(f"{rank.peak / GIB:.1f}" for rank in ranks)
        rows.append(("", f"rank {fullest} of the pipeline's; the peak of each: {peaks} GiB"))
    rows.append(("", MEMORY_SOURCE if weight_bytes(plan.config.precision.format) == 2 else MEMORY_SOURCE_FP32))
    return rows


def _time_rows(plan: RunPlan, machine: Machine) -> list[tuple[str, str]]:
    timed = _time(plan, machine)
    if timed is None:
        return [("time", "no times were measured in float32")]
    step = timed.first_step
    names = {
        "layers": step.layers,
        "tensor and context traffic": step.tensor_and_context,
        "bubble": step.bubble,
        "pipeline traffic": step.pipeline_traffic,
        "gradients and weights": step.data_traffic,
        "optimizer": step.optimizer,
    }
    shares = ", ".join(f"{name} {seconds / step.total:.1%}" for name, seconds in names.items() if seconds)
    return [
        (
            "time",
            f"{step.total:.3f} s a step, {timed.tokens_per_second_per_gpu:,.0f} tokens/s and "
            f"{timed.model_tflops_per_gpu:.0f} model TFLOP/s a GPU ({machine.gpu.name})",
        ),
        ("", shares),
        (
            "",
            f"{timed.days:,.4g} days of training alone = {timed.gpu_hours:,.0f} GPU-hours{_price_text(timed, machine)}",
        ),
        ("", f"from {machine.gpu.source}"),
        *([("", BEYOND_TWO_GPUS)] if plan.layout.world_size > 2 else []),
        *_graphs_rows(plan, machine.gpu),
        *_uncounted_time_rows(plan),
    ]


def _graphs_rows(plan: RunPlan, gpu: Gpu) -> list[tuple[str, str]]:
    """Return what CUDA graphs would gain, where it is possible and the CPU is in the way."""
    train = replace(plan.config.train, cuda_graphs=True)
    try:
        graphed = plan_run(replace(plan.config, train=train), plan.layout.world_size)
    except ConfigError:
        return []
    gain = plan_time(plan, gpu).first_step.total / plan_time(graphed, gpu).first_step.total - 1
    if gain < WORTH_SAYING:
        return []
    text = "the CPU starts some layers more slowly than the GPU runs them; a step of train.cuda_graphs=true is"
    return [("", f"{text} planned {gain:.0%} faster")]


def _uncounted_time_rows(plan: RunPlan) -> list[tuple[str, str]]:
    rows = []
    if plan.config.parallel.overlap_tensor_comm:
        rows.append(("", "not counted: the traffic that parallel.overlap_tensor_comm hides"))
    parts = [key for key in beyond_nemotron_h(plan.config.model) if key not in ("max_position_embeddings", "rope_base")]
    if parts:
        slow = "; capped attention is not fused, and much slower" if "attention_logit_cap" in parts else ""
        rows.append(("", f"not counted: what model.{', model.'.join(parts)} take{slow}"))
    return rows


def _price_text(timed: RunTime, machine: Machine) -> str:
    price = _price(timed, machine)
    if price is None:
        return " (price_per_gpu_hour=X adds the cost)"
    return f" = {price:,.0f} at {machine.price_per_gpu_hour:g} a GPU-hour"


def _checkpoint_rows(plan: RunPlan, machine: Machine) -> list[tuple[str, str]]:
    text = f"{checkpoint_bytes(plan) / 1e9:,.4g} GB, of it {_weights_bytes(plan) / 1e9:,.4g} GB weights"
    every, timed = plan.config.checkpoint.every_steps, _time(plan, machine)
    if every and timed is not None:
        minutes = every * timed.first_step.total / 60
        text += f"; every {every:,} steps = {minutes:,.3g} minutes, {plan.num_steps // every:,} in the run"
    return [("checkpoint", text)]
