"""What cannot work: every rule across keys, checked before anything is started, all violations reported together.

A rule is a small function that yields a message for each violation, with the values that clash and the keys to change.
Rules of the model's sizes and its layout are here; those of its parts in `architecture_rules.py`, those of FP8 in
`precision_rules.py`, those of the run (batches, learning rate, data) in `run_rules.py`.
"""

import math
from collections.abc import Callable, Iterator

from nemotron_train.config.schema import ModelSection, PrecisionFormat, PrimaryWeights, RunConfig
from nemotron_train.config.typed import raise_if
from nemotron_train.errors import ConfigError
from nemotron_train.plan.architecture_rules import ARCHITECTURE_RULES
from nemotron_train.plan.batching import sample_lengths
from nemotron_train.plan.layout import ranks_per_replica
from nemotron_train.plan.nearest import nearest_divisors, nearest_multiples, next_multiple
from nemotron_train.plan.pattern import LayerKind, has_layers, parse_pattern
from nemotron_train.plan.pipeline_cut import check_cut
from nemotron_train.plan.precision_rules import PRECISION_RULES
from nemotron_train.plan.ranges import out_of_range
from nemotron_train.plan.run_rules import RUN_RULES

Rule = Callable[[RunConfig, int], Iterator[str]]


def check_rules(config: RunConfig, world_size: int) -> None:
    """Raise one ConfigError that lists every violation, or return."""
    problems = list(out_of_range(config))
    if world_size < 1:
        problems.append(f"world_size={world_size} must be at least 1.")
    raise_if(problems)  # the rules below divide by these numbers
    rules = (*MODEL_RULES, *ARCHITECTURE_RULES, *PRECISION_RULES, *RUN_RULES)
    raise_if([problem for rule in rules for problem in rule(config, world_size)])


def pattern_is_readable_and_can_be_cut(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    try:
        pattern = parse_pattern(config.model.layer_pattern)
        check_cut(pattern, parallel.pipeline_parallel_size, parallel.virtual_pipeline_size)
    except ConfigError as error:
        yield str(error)


def query_groups_divide_attention_heads(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    if has_layers(model.layer_pattern, LayerKind.attention) and model.num_attention_heads % model.num_query_groups:
        yield (
            f"model.num_attention_heads={model.num_attention_heads} is not a multiple of "
            f"model.num_query_groups={model.num_query_groups}: every group serves the same number of heads. "
            f"Try {nearest_divisors(model.num_attention_heads, model.num_query_groups)} groups."
        )


def mamba_groups_divide_mamba_heads(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    if has_layers(model.layer_pattern, LayerKind.mamba) and model.mamba_num_heads % model.mamba_num_groups:
        yield (
            f"model.mamba_num_heads={model.mamba_num_heads} is not a multiple of "
            f"model.mamba_num_groups={model.mamba_num_groups}: every group serves the same number of heads. "
            f"Try {nearest_divisors(model.mamba_num_heads, model.mamba_num_groups)} groups."
        )


def ranks_hold_whole_replicas(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    ranks = ranks_per_replica(config.parallel)
    if world_size % ranks:
        yield (
            f"{world_size} ranks cannot hold whole copies of the model, which take {ranks} ranks each "
            f"(parallel.tensor_parallel_size={parallel.tensor_parallel_size} x "
            f"parallel.pipeline_parallel_size={parallel.pipeline_parallel_size} x "
            f"parallel.context_parallel_size={parallel.context_parallel_size}). "
            f"Start {nearest_multiples(world_size, ranks)} ranks, or change these keys."
        )


def keys_split_over_tensor_parallel_ranks(model: ModelSection) -> list[str]:
    """Return the keys of the model whose numbers are shared out, narrowest first."""
    keys = ["num_query_groups", "num_attention_heads"]  # whatever the layers: Megatron-Core's configuration checks both
    if has_layers(model.layer_pattern, LayerKind.mamba):
        keys = ["mamba_num_groups", *keys, "mamba_num_heads"]
    return [*keys, "ffn_hidden_size"] if has_layers(model.layer_pattern, LayerKind.mlp) else keys


def tensor_parallel_size_divides_the_model(config: RunConfig, world_size: int) -> Iterator[str]:
    tp_size = config.parallel.tensor_parallel_size
    for name in keys_split_over_tensor_parallel_ranks(config.model):
        value = getattr(config.model, name)
        if value % tp_size:
            yield (
                f"model.{name}={value} cannot be split over parallel.tensor_parallel_size={tp_size} ranks. "
                f"Use {nearest_divisors(value, tp_size)} ranks, or model.{name} of {nearest_multiples(value, tp_size)}."
            )


def tensor_parallel_size_divides_the_vocabulary(config: RunConfig, world_size: int) -> Iterator[str]:
    vocab_size, tp_size = config.model.vocab_size, config.parallel.tensor_parallel_size
    if vocab_size % tp_size:
        yield (
            f"model.vocab_size={vocab_size} cannot be split over parallel.tensor_parallel_size={tp_size} ranks. "
            f"Use {next_multiple(vocab_size, tp_size)}: rows beyond the tokenizer's are never drawn."
        )


def sequence_parallel_needs_tensor_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.sequence_parallel:
        return
    if parallel.tensor_parallel_size == 1:
        yield (
            "parallel.sequence_parallel=true has no effect with parallel.tensor_parallel_size=1. "
            "Set it to false, or use 2 or more tensor-parallel ranks."
        )
    for key, seq_length in sample_lengths(config):
        if seq_length % parallel.tensor_parallel_size == 0:
            continue
        yield (
            f"{key}={seq_length} cannot be split over parallel.tensor_parallel_size="
            f"{parallel.tensor_parallel_size} ranks, as parallel.sequence_parallel=true asks. "
            f"Use {nearest_multiples(seq_length, parallel.tensor_parallel_size)} tokens."
        )


def samples_split_over_context_parallel_ranks(config: RunConfig, world_size: int) -> Iterator[str]:
    # Two runs of equal length for every rank (data/sequence_part.py); sequence parallelism splits a rank's part again.
    parallel = config.parallel
    if parallel.context_parallel_size == 1:
        return
    split_again = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    multiple = parallel.context_parallel_size * math.lcm(2, split_again)
    for key, seq_length in sample_lengths(config):
        if seq_length % multiple:
            again = f", split again over parallel.tensor_parallel_size={split_again} ranks" if split_again > 1 else ""
            yield (
                f"{key}={seq_length} cannot be split into two equal runs for each of "
                f"parallel.context_parallel_size={parallel.context_parallel_size} ranks{again}. "
                f"Use {nearest_multiples(seq_length, multiple)} tokens, or another parallel.context_parallel_size."
            )


def mamba_heads_split_over_context_parallel_ranks(config: RunConfig, world_size: int) -> Iterator[str]:
    # A rank scans the whole sequence for a share of its tensor-parallel rank's heads (model/head_shares.py).
    model, tp_size = config.model, config.parallel.tensor_parallel_size
    cp_size = config.parallel.context_parallel_size
    heads, groups = model.mamba_num_heads, model.mamba_num_groups
    if cp_size == 1 or not has_layers(model.layer_pattern, LayerKind.mamba):
        return
    if heads % tp_size or groups % tp_size:
        return  # reported by another rule
    sizes = f"parallel.tensor_parallel_size={tp_size} x parallel.context_parallel_size={cp_size}"
    if heads % (tp_size * cp_size):
        yield (
            f"model.mamba_num_heads={heads} cannot be split over {sizes} ranks, each of which scans the whole sequence "
            f"for a share of the heads. Use {nearest_divisors(heads // tp_size, cp_size)} context-parallel ranks, or "
            f"model.mamba_num_heads of {nearest_multiples(heads, tp_size * cp_size)}."
        )
    elif max(groups // tp_size, cp_size) % min(groups // tp_size, cp_size):
        yield (
            f"model.mamba_num_groups={groups} over {sizes} ranks: {cp_size} ranks can neither share out the "
            f"{groups // tp_size} groups of a tensor-parallel rank evenly nor share each. Let one of these two numbers "
            "divide the other: change parallel.context_parallel_size, parallel.tensor_parallel_size or "
            "model.mamba_num_groups."
        )


def virtual_pipeline_needs_a_pipeline(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    if parallel.virtual_pipeline_size > 1 and parallel.pipeline_parallel_size == 1:
        yield (
            f"parallel.virtual_pipeline_size={parallel.virtual_pipeline_size} needs "
            "parallel.pipeline_parallel_size of 2 or more, it is 1."
        )


def parameter_gather_overlaps_with_gradient_reduction(config: RunConfig, world_size: int) -> Iterator[str]:
    # Megatron-Core gathers bucket by bucket, and without overlapped reduction there is only one bucket.
    if config.parallel.overlap_param_gather and not config.parallel.overlap_grad_reduce:
        yield "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true, it is false."


# Transformer Engine scatters an output in pieces of a quarter of its columns, each a multiple of the 16 that FP8 takes.
SCATTERED_COLUMNS = 64


def tensor_parallel_overlap_has_what_it_needs(config: RunConfig, world_size: int) -> Iterator[str]:
    # Transformer Engine 2.11: its user buffers gather and scatter parts of a sequence, are of one size, and take no
    # tensors with scales of blocks. With FP8 weights nobody has tried.
    parallel, format = config.parallel, config.precision.format
    if not parallel.overlap_tensor_comm:
        return
    if parallel.tensor_parallel_size == 1:
        yield (
            "parallel.overlap_tensor_comm=true has no effect with parallel.tensor_parallel_size=1. "
            "Set it to false, or use 2 or more tensor-parallel ranks."
        )
    elif not parallel.sequence_parallel:
        yield "parallel.overlap_tensor_comm=true needs parallel.sequence_parallel=true, it is false."
    if format in (PrecisionFormat.fp32, PrecisionFormat.fp8_block):
        yield (
            f"parallel.overlap_tensor_comm=true is not possible with precision.format={format.value}. "
            "Set it to false, or choose bf16, fp8_current or fp8_delayed."
        )
    if config.precision.primary_weights is PrimaryWeights.fp8:
        yield (
            "parallel.overlap_tensor_comm=true is not possible with precision.primary_weights=fp8. "
            "Set the first to false, or the second to bf16."
        )
    if config.model.hidden_size % SCATTERED_COLUMNS:
        yield (
            f"model.hidden_size={config.model.hidden_size} is not a multiple of the {SCATTERED_COLUMNS} that "
            "parallel.overlap_tensor_comm=true asks for. "
            f"Use {nearest_multiples(config.model.hidden_size, SCATTERED_COLUMNS)}, or set it to false."
        )
    lengths = sample_lengths(config)
    for key, length in lengths[1:]:
        if length != lengths[0][1]:
            yield (
                f"parallel.overlap_tensor_comm=true takes samples of one length: {lengths[0][0]}={lengths[0][1]}, but "
                f"{key}={length}. Set it to false, or train each length in a run of its own."
            )


MODEL_RULES: tuple[Rule, ...] = (
    pattern_is_readable_and_can_be_cut,
    query_groups_divide_attention_heads,
    mamba_groups_divide_mamba_heads,
    ranks_hold_whole_replicas,
    tensor_parallel_size_divides_the_model,
    tensor_parallel_size_divides_the_vocabulary,
    sequence_parallel_needs_tensor_parallel,
    samples_split_over_context_parallel_ranks,
    mamba_heads_split_over_context_parallel_ranks,
    virtual_pipeline_needs_a_pipeline,
    parameter_gather_overlaps_with_gradient_reduction,
    tensor_parallel_overlap_has_what_it_needs,
)
