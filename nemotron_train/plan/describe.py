"""What the run will be, for people (`describe`) and for programs (`summarize`)."""

from collections import Counter
from typing import Any

from nemotron_train.config.schema import LrSchedule, PrecisionFormat, PrimaryWeights
from nemotron_train.plan.architecture_rules import beyond_nemotron_h
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.precision_map import FP8_BLOCK
from nemotron_train.plan.rank_share import scan_share
from nemotron_train.plan.run_plan import RunPlan


def describe(plan: RunPlan) -> str:
    """Return the banner that opens a run: some 15 lines, and the FP8 audit where there is FP8."""
    rows = [
        ("run", f"{plan.config.run.name} in {plan.config.run.dir}"),
        *_model_rows(plan),
        *_layout_rows(plan),
        *_precision_rows(plan),
        *_step_rows(plan),
        ("rate", _learning_rate_text(plan)),
        *_phase_rows(plan),
    ]
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def summarize(plan: RunPlan) -> dict[str, Any]:
    """Return the plan's numbers under stable names, ready for JSON."""
    sizes, layout, batches = plan.sizes, plan.layout, plan.batches
    return {
        "run": plan.config.run.name,
        "parameters": sizes.parameters,
        "parameters_by_part": {name: count for name, count in _parts(plan)},
        "layers": {kind.name: sizes.num_layers[kind] for kind in LayerKind},
        "flops_per_token": sizes.flops_per_token,
        "train_flops": plan.train_flops,
        "world_size": layout.world_size,
        "tensor_parallel_size": layout.tensor,
        "context_parallel_size": layout.context,
        "pipeline_parallel_size": layout.pipeline,
        "virtual_pipeline_size": layout.virtual_pipeline,
        "data_parallel_size": layout.data,
        "model_chunks": [_chunk_text(plan, chunk) for chunk in plan.chunks],
        "pipeline_imbalance": _imbalance(plan),
        "seq_length": batches.seq_length_at(0),
        "global_batch_size": batches.global_batch_size_at(0),
        "micro_batches": batches.num_micro_batches_at(0),
        "tokens_per_step": plan.tokens_per_step,
        "batch_schedule": [
            {
                "start_tokens": segment.start_tokens,
                "global_batch_size": segment.global_batch_size,
                "seq_length": segment.seq_length,
            }
            for segment in batches.segments
        ],
        "num_steps": plan.num_steps,
        "train_tokens": plan.config.train.train_tokens,
        "consumed_tokens_at_end": batches.consumed_at_end,
        "learning_rate_at_end": plan.learning_rate_at(batches.consumed_at_end),
    }


def _parts(plan: RunPlan) -> list[tuple[str, int]]:
    sizes = plan.sizes
    layers = [(kind.name, sizes.num_layers[kind] * sizes.layer_parameters[kind]) for kind in LayerKind]
    return [
        *layers,
        ("embedding", sizes.embedding_parameters),
        ("positions", sizes.position_parameters),
        ("head", sizes.head_parameters),
        ("final_norm", sizes.final_norm_parameters),
    ]


def _model_rows(plan: RunPlan) -> list[tuple[str, str]]:
    sizes, model = plan.sizes, plan.config.model
    kinds = ", ".join(f"{sizes.num_layers[kind]} {kind.name}" for kind in LayerKind)
    parts = ", ".join(f"{name.replace('_', ' ')} {short(count)}" for name, count in _parts(plan) if count)
    tied = ", head tied to the embedding" if model.tied_embeddings else ""
    beyond = beyond_nemotron_h(model)
    return [
        ("model", f"{len(plan.layers)} layers: {kinds}"),
        ("", f"hidden {model.hidden_size:,}, vocabulary {model.vocab_size:,}{tied}"),
        *([("", ", ".join(f"{key} {value}" for key, value in beyond.items()))] if beyond else []),
        ("parameters", f"{short(sizes.parameters)} ({sizes.parameters:,}): {parts}"),
        ("compute", f"{sizes.flops_per_token / 1e9:.4g} GFLOP a token, {plan.train_flops:.3g} FLOP in all"),
    ]


def _layout_rows(plan: RunPlan) -> list[tuple[str, str]]:
    layout, parallel = plan.layout, plan.config.parallel
    sequence = " with sequence parallelism" if parallel.sequence_parallel else ""
    sequence += ", exchanged while products run" if parallel.overlap_tensor_comm else ""
    rows = [
        (
            "ranks",
            f"{layout.world_size} = tensor {layout.tensor}{sequence} x context {layout.context} x "
            f"pipeline {layout.pipeline} x data {layout.data}; {plan.config.precision.format.value}",
        )
    ]
    if layout.context > 1:
        seq_length = plan.batches.seq_length_at(0)
        runs = f"2 runs of {seq_length // (2 * layout.context):,} of the {seq_length:,} tokens of a sample"
        scans = ""
        if plan.sizes.num_layers[LayerKind.mamba]:
            heads = plan.config.model.mamba_num_heads
            scans = f", and scans all of them for {scan_share(plan.config).mamba_num_heads} of the {heads} Mamba heads"
        rows.append(("context", f"every rank has {runs}{scans}"))
    if layout.pipeline == 1:
        return rows
    costs = plan.pipeline_costs()
    by_hand = "by hand" if plan.pattern.cuts is not None else "by cost"
    rows.append(("pipeline", f"cut {by_hand}; the slowest rank does {_imbalance(plan):.1%} more than the mean"))
    for rank in range(layout.pipeline):
        chunks = (f"{chunk.start}-{chunk.stop - 1} {_chunk_text(plan, chunk)}" for chunk in plan.chunks_of(rank))
        rows.append(("", f"rank {rank}: {costs[rank] / sum(costs):.1%} of the cost, layers {'   '.join(chunks)}"))
    return rows


def _precision_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """Return the FP8 audit: every kind of matrix product with its shape on a rank, and why some are not in FP8."""
    precision, batches = plan.config.precision, plan.batches
    if not precision.format.is_fp8:
        return []
    tp_size, tokens = plan.layout.tensor, batches.seq_length_at(0) // plan.layout.context * batches.micro_batch_size
    kinds = Counter((gemm.name.split(".", 3)[-1], gemm.on_rank(tp_size), gemm.reason) for gemm in plan.gemms)
    in_fp8 = sum(gemm.in_fp8 for gemm in plan.gemms)
    primary = ", whose weights ranks hold in FP8 only" if precision.primary_weights is PrimaryWeights.fp8 else ""
    what = f"{in_fp8} of {len(plan.gemms)} linear layers in {precision.format.value}{primary}"
    rows = [("products", f"{what}, on a rank:")]
    for (name, (inputs, outputs), reason), count in kinds.items():
        kept = f"bf16: {reason}" if reason else precision.format.value
        rows.append(("", f"{count} x {name}: {tokens:,} tokens x {inputs:,} x {outputs:,}, {kept}"))
    if precision.format is PrecisionFormat.fp8_block and tokens % FP8_BLOCK:
        rows.append(("", f"slow: {tokens:,} tokens are not a multiple of the {FP8_BLOCK} that share a scale"))
    return rows


def _step_rows(plan: RunPlan) -> list[tuple[str, str]]:
    batches = plan.batches
    started = ", started as CUDA graphs" if plan.config.train.cuda_graphs else ""
    rows = [
        (
            "step",
            f"{batches.global_batch_size_at(0)} samples x {batches.seq_length_at(0):,} tokens = "
            f"{plan.tokens_per_step:,} tokens, on every rank {batches.num_micro_batches_at(0)} micro-batch(es) "
            f"of {batches.micro_batch_size}{started}",
        )
    ]
    for segment in batches.segments[1:]:
        start = segment.start_tokens
        rows.append(
            (
                "",
                f"from {start:,} tokens on: {segment.global_batch_size} samples x {segment.seq_length:,} tokens, "
                f"{batches.num_micro_batches_at(start)} micro-batches{_reached(plan, start)}",
            )
        )
    rows.append(("steps", f"{plan.num_steps:,}, {batches.consumed_at_end:,} of {batches.train_tokens:,} tokens"))
    return rows


def _learning_rate_text(plan: RunPlan) -> str:
    lr = plan.config.lr
    text = f"{lr.schedule.value}: "
    if lr.warmup_tokens:
        text += f"0 to {lr.peak:g} over {lr.warmup_tokens:,} tokens, "
    if lr.schedule is LrSchedule.constant:
        return text + (f"then {lr.peak:g}" if lr.warmup_tokens else f"{lr.peak:g}")
    if lr.schedule is LrSchedule.cosine:
        return text + f"then a cosine from {lr.peak:g} to {lr.min:g}"
    assert lr.decay_shape is not None, "plan.rules asks for lr.decay_shape"
    return text + f"{lr.peak:g} held, to {lr.min:g} over the last {lr.decay_tokens:,} ({lr.decay_shape.value})"


def _phase_rows(plan: RunPlan) -> list[tuple[str, str]]:
    rows = []
    for index, phase in enumerate(plan.config.data.phases):
        total = sum(weight.weight for weight in phase.weights)
        shares = ", ".join(
            f"{weight.source} {weight.weight / total:.1%}"
            + (f" (fim {weight.fim_rate:.0%})" if weight.fim_rate else "")
            for weight in phase.weights
        )
        start = f"from {phase.start_tokens:,} tokens on: " if index else ""
        rows.append(("data" if not index else "", f"{start}{shares}{_reached(plan, phase.start_tokens)}"))
    return rows


def _reached(plan: RunPlan, start_tokens: int) -> str:
    return "" if start_tokens < plan.batches.consumed_at_end else " (not reached)"


def _chunk_text(plan: RunPlan, chunk: range) -> str:
    return "".join(plan.layers[layer].value for layer in chunk)


def _imbalance(plan: RunPlan) -> float:
    """Return by which fraction the most expensive pipeline rank is above the mean."""
    costs = plan.pipeline_costs()
    return max(costs) * len(costs) / sum(costs) - 1


def short(count: float) -> str:
    """Write a large number with a unit: 12.31B."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.4g}{unit}"
    return f"{count:g}"
