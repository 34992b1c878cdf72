"""Which layouts fit so many GPUs, which is the fastest, and why do the others not fit?

Tried are tensor, context and pipeline sizes, virtual stages, micro-batches and recomputation; all else stays as asked.
A layout is refused by the rules of a run or by memory.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import gcd
from typing import Any

from nemotron_train.config.schema import Recompute, RunConfig
from nemotron_train.errors import ConfigError
from nemotron_train.plan.batching import sample_lengths
from nemotron_train.plan.gpu_table import Gpu
from nemotron_train.plan.layout import ranks_per_replica
from nemotron_train.plan.measured import GPUS_PER_NODE
from nemotron_train.plan.memory import RankMemory, memory_gib_per_gpu, needed_gib, plan_memory
from nemotron_train.plan.nearest import nearest_multiples
from nemotron_train.plan.pattern import CUT
from nemotron_train.plan.rules import check_rules, keys_split_over_tensor_parallel_ranks
from nemotron_train.plan.run_plan import RunPlan, plan_run
from nemotron_train.plan.step_time import BEYOND_TWO_GPUS, has_times, plan_time

TENSOR_SIZES, CONTEXT_SIZES, PIPELINE_SIZES = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)
VIRTUAL_SIZES, MICRO_BATCH_SIZES = (1, 2, 4), (1, 2, 4)
SHOWN = 12
LONG_SAMPLE = 16_384  # tokens; shorter samples are not split over context-parallel ranks here


@dataclass(frozen=True)
class Candidate:
    """A layout that runs."""

    tensor: int
    context: int
    pipeline: int
    virtual_pipeline: int
    micro_batch_size: int
    recompute: Recompute
    memory_gib: float
    tokens_per_second_per_gpu: float
    days: float
    uncut_pattern: str | None  # of the model, where the run asked for has cuts by hand; they belong to its own layout

    def overrides(self) -> str:
        """Return what to write on the command line."""
        pattern = f" 'model.layer_pattern=\"{self.uncut_pattern}\"'" if self.uncut_pattern else ""
        return (
            f"parallel.tensor_parallel_size={self.tensor} parallel.sequence_parallel={str(self.tensor > 1).lower()} "
            f"parallel.context_parallel_size={self.context} parallel.pipeline_parallel_size={self.pipeline} "
            f"parallel.virtual_pipeline_size={self.virtual_pipeline} train.micro_batch_size={self.micro_batch_size} "
            f"train.recompute={self.recompute.value}{pattern}"
        )


@dataclass(frozen=True)
class Found:
    """The answer: what runs, fastest first, and how many layouts each reason kept out."""

    world_size: int
    gpu: Gpu
    candidates: tuple[Candidate, ...]
    refused: tuple[tuple[str, int], ...]  # reason, number of layouts; most frequent first
    advice: tuple[str, ...]


def search_layouts(config: RunConfig, world_size: int, gpu: Gpu) -> Found:
    """Try every layout.

    Raises:
        ConfigError: the precision has no measured times to rank by.
    """
    if not has_times(config.precision.format):
        raise ConfigError(f"precision.format={config.precision.format.value} has no measured times to rank layouts by.")
    candidates: list[Candidate] = []
    refused: Counter[str] = Counter()
    for trial in _layouts(config):
        if (reason := refusal(trial, world_size)) is not None:
            refused[reason] += 1
            continue
        plan = plan_run(trial, world_size)  # cut for itself: the cut goes by micro-batches and recomputation too
        ranks = plan_memory(plan)
        if needed_gib(ranks) > gpu.memory_gib:
            refused[f"needs more than the {gpu.memory_gib:g} GiB of {gpu.name}"] += 1
            continue
        candidates.append(_candidate(plan, ranks, gpu, cut_by_hand=CUT in config.model.layer_pattern))
    candidates.sort(key=lambda each: each.tokens_per_second_per_gpu, reverse=True)
    return Found(
        world_size, gpu, tuple(candidates), tuple(refused.most_common()), tuple(batch_advice(config, world_size))
    )


def _layouts(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the run under every layout, micro-batch and way to recompute."""
    longest = max(length for _, length in sample_lengths(config))
    contexts = CONTEXT_SIZES if longest >= LONG_SAMPLE else (1,)
    for tensor, context, pipeline, virtual in product(TENSOR_SIZES, contexts, PIPELINE_SIZES, VIRTUAL_SIZES):
        if virtual > 1 and pipeline == 1:
            continue
        for micro_batch, recompute in product(MICRO_BATCH_SIZES, Recompute):
            yield _under_layout(config, (tensor, context, pipeline, virtual), micro_batch, recompute)


def _under_layout(
    config: RunConfig, layout: tuple[int, int, int, int], micro_batch_size: int, recompute: Recompute
) -> RunConfig:
    """Return the run under another layout; cuts by hand are dropped, they belong to one of them.

    Args:
        layout: tensor, context, pipeline, virtual.
    """
    tensor, context, pipeline, virtual = layout
    parallel = replace(
        config.parallel,
        tensor_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        context_parallel_size=context,
        pipeline_parallel_size=pipeline,
        virtual_pipeline_size=virtual,
    )
    model = replace(config.model, layer_pattern=config.model.layer_pattern.replace(CUT, ""))
    train = replace(config.train, micro_batch_size=micro_batch_size, recompute=recompute)
    return replace(config, parallel=parallel, model=model, train=train)


def refusal(config: RunConfig, world_size: int) -> str | None:
    """Return why a layout cannot be, in one line, or None."""
    parallel, train = config.parallel, config.train
    tensor = parallel.tensor_parallel_size
    ranks = ranks_per_replica(parallel)
    if world_size % ranks:
        return f"{world_size:,} GPUs do not hold whole replicas of tensor x context x pipeline GPUs"
    for name in keys_split_over_tensor_parallel_ranks(config.model):
        if (count := getattr(config.model, name)) % tensor:
            return f"model.{name}={count} cannot be split over parallel.tensor_parallel_size={tensor}"
    samples = world_size // ranks * train.micro_batch_size
    if train.global_batch_size % samples:
        return (
            f"train.global_batch_size={train.global_batch_size} does not divide among data-parallel ranks x "
            "train.micro_batch_size"
        )
    if parallel.virtual_pipeline_size > 1 and train.global_batch_size // samples % parallel.pipeline_parallel_size:
        return "virtual stages need a multiple of the pipeline size of micro-batches on a rank"
    try:
        check_rules(config, world_size)
    except ConfigError as error:
        problem = str(error).splitlines()[-1].removeprefix("- ")
        return re.sub(r"(?<![\w,])\d[\d,]*(?!\w)", "N", problem)  # one reason, whatever its numbers
    return None


def _candidate(plan: RunPlan, ranks: Sequence[RankMemory], gpu: Gpu, cut_by_hand: bool) -> Candidate:
    layout, train, timed = plan.layout, plan.config.train, plan_time(plan, gpu)
    return Candidate(
        layout.tensor,
        layout.context,
        layout.pipeline,
        layout.virtual_pipeline,
        train.micro_batch_size,
        train.recompute,
        memory_gib_per_gpu(ranks),
        timed.tokens_per_second_per_gpu,
        timed.days,
        plan.config.model.layer_pattern if cut_by_hand else None,
    )


def batch_advice(config: RunConfig, world_size: int) -> Iterator[str]:
    """Yield what would let the batch divide, where it does not among replicas of one GPU each."""
    batch = config.train.global_batch_size
    needed = world_size // gcd(world_size, batch)
    if needed == 1:
        return
    yield (
        f"train.global_batch_size={batch} = {_factors(batch)} divides among {world_size:,} GPUs only where tensor x "
        f"context x pipeline is a multiple of {needed}"
    )
    for tensor in TENSOR_SIZES:
        shared_out = (getattr(config.model, key) for key in keys_split_over_tensor_parallel_ranks(config.model))
        divides = not any(count % tensor for count in shared_out)
        if not divides or world_size % tensor or needed == tensor:
            continue
        counts = {tensor * divisor for divisor in range(1, batch + 1) if batch % divisor == 0}
        whole_nodes = [count for count in counts if count % GPUS_PER_NODE == 0] or list(counts)
        nearest = sorted(sorted(whole_nodes, key=lambda count: abs(count - world_size))[:2])
        nodes = " or ".join(f"{count:,} GPUs ({count / GPUS_PER_NODE:g} nodes)" for count in nearest)
        batches = nearest_multiples(batch, world_size // tensor)
        yield f"with tensor {tensor} alone: a batch of {batches}, or {nodes} with this one"


def _factors(number: int) -> str:
    """Write a number as its prime powers: 2^5 x 23."""
    parts, rest, divisor = [], number, 2
    while rest > 1:
        power = 0
        while rest % divisor == 0:
            rest, power = rest // divisor, power + 1
        if power:
            parts.append(f"{divisor}^{power}" if power > 1 else f"{divisor}")
        divisor += 1
    return " x ".join(parts) or str(number)


def describe_search(found: Found) -> str:
    """Return the answer as a table: fastest first, then why the others do not run."""
    lines = [
        f"{len(found.candidates)} layouts run on {found.world_size:,} GPUs of {found.gpu.memory_gib:g} GiB "
        f"({found.gpu.name}), fastest first:",
        "  tensor  context  pipeline  virtual  micro-batch  recompute    GiB  tokens/s/GPU       days",
    ]
    for found_one in found.candidates[:SHOWN]:
        lines.append(
            f"{found_one.tensor:8}{found_one.context:9}{found_one.pipeline:10}{found_one.virtual_pipeline:9}"
            f"{found_one.micro_batch_size:13}{found_one.recompute.value:>11}{found_one.memory_gib:7.1f}"
            f"{found_one.tokens_per_second_per_gpu:14,.0f}  {found_one.days:9.4g}"
        )
    if found.candidates:
        lines += ["The first, on the command line:", f"  {found.candidates[0].overrides()}"]
    if found.refused:
        lines += ["The others:", *(f"{count:8} {reason}" for reason, count in found.refused)]
    lines += [f"{'':9}{text}" for text in found.advice]
    lines.append(f"Times: from {found.gpu.source}; {BEYOND_TWO_GPUS}. Memory: derived.")
    return "\n".join(lines)


def search_json(found: Found) -> dict[str, Any]:
    """Return the answer for programs: all layouts that run."""
    candidates = [{**asdict(each), "overrides": each.overrides()} for each in found.candidates]
    return {
        "world_size": found.world_size,
        "gpu": found.gpu.name,
        "times_from": found.gpu.source,
        "layouts": [{**each, "recompute": each["recompute"].value} for each in candidates],
        "refused": [{"reason": reason, "layouts": count} for reason, count in found.refused],
        "advice": list(found.advice),
    }
