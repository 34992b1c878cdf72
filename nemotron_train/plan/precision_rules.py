"""What cannot work about precision; the form of the rules is that of `rules.py`."""

from collections.abc import Iterator

from nemotron_train.config.schema import (
    Fp8Scales,
    ModelSection,
    PrecisionFormat,
    PrimaryWeights,
    RunConfig,
    StateFormat,
)
from nemotron_train.errors import ConfigError
from nemotron_train.plan.batching import sample_lengths
from nemotron_train.plan.nearest import nearest_multiples, next_multiple
from nemotron_train.plan.pattern import ParsedPattern, parse_pattern
from nemotron_train.plan.precision_map import FP8_BLOCK, FP8_COLUMNS_MULTIPLE, FP8_ROWS_MULTIPLE, list_gemms


def fp8_keys_need_fp8(config: RunConfig, world_size: int) -> Iterator[str]:
    precision = config.precision
    if precision.format.is_fp8:
        return
    for key, value, neutral in (
        ("bf16_first_layers", precision.bf16_first_layers, "0"),
        ("bf16_last_layers", precision.bf16_last_layers, "0"),
        ("fp8_scales", precision.fp8_scales and precision.fp8_scales.value, "null"),
        ("primary_weights", "fp8" if precision.primary_weights is PrimaryWeights.fp8 else None, "bf16"),
    ):
        if value:
            yield (
                f"precision.{key}={value} has no effect with precision.format={precision.format.value}. "
                f"Set it to {neutral}, or choose an FP8 format."
            )


def some_layers_run_in_fp8(config: RunConfig, world_size: int) -> Iterator[str]:
    precision, pattern = config.precision, _pattern(config)
    if not precision.format.is_fp8 or pattern is None:
        return
    kept = precision.bf16_first_layers + precision.bf16_last_layers
    if kept >= len(pattern.layers):
        yield (
            f"precision.bf16_first_layers={precision.bf16_first_layers} and "
            f"precision.bf16_last_layers={precision.bf16_last_layers} leave none of the {len(pattern.layers)} layers "
            f"of model.layer_pattern in {precision.format.value}. Keep fewer, or set precision.format=bf16."
        )


def delayed_scaling_covers_all_layers(config: RunConfig, world_size: int) -> Iterator[str]:
    # Its maxima are reduced over ranks when the whole forward pass ends, for all layers or none (Megatron-Core 0.16).
    precision = config.precision
    if precision.format is not PrecisionFormat.fp8_delayed:
        return
    for key in ("bf16_first_layers", "bf16_last_layers"):
        value = getattr(precision, key)
        if value:
            yield f"precision.{key}={value} is not possible with precision.format=fp8_delayed. Set it to 0."
    if precision.fp8_scales is Fp8Scales.power_of_two:
        yield (
            "precision.fp8_scales=power_of_two is not possible with precision.format=fp8_delayed. "
            "Set it to null, or choose fp8_current or fp8_block."
        )


def delayed_scaling_keeps_bf16_weights(config: RunConfig, world_size: int) -> Iterator[str]:
    # A weight would be stored with the scale of a time before its update, and the maxima that later scales follow from
    # would begin with what memory held when it was built.
    precision = config.precision
    if precision.format is PrecisionFormat.fp8_delayed and precision.primary_weights is PrimaryWeights.fp8:
        yield (
            "precision.primary_weights=fp8 is not possible with precision.format=fp8_delayed. "
            "Set it to bf16, or choose fp8_current or fp8_block."
        )


def fp8_products_are_aligned(config: RunConfig, world_size: int) -> Iterator[str]:
    pattern, tp_size = _pattern(config), config.parallel.tensor_parallel_size
    if not config.precision.format.is_fp8 or pattern is None:
        return
    cp_size = config.parallel.context_parallel_size
    shared = f" / parallel.context_parallel_size={cp_size}" if cp_size > 1 else ""
    for key, length in sample_lengths(config):
        tokens = length // cp_size * config.train.micro_batch_size
        if tokens % FP8_COLUMNS_MULTIPLE == 0:
            continue
        yield (
            f"{key}={length}{shared} x train.micro_batch_size={config.train.micro_batch_size} = "
            f"{tokens} tokens cannot be multiplied in FP8, which takes multiples of {FP8_COLUMNS_MULTIPLE}. "
            f"Use {nearest_multiples(tokens, FP8_COLUMNS_MULTIPLE)} tokens."
        )
    seen = set()
    for gemm in list_gemms(config, pattern):
        shape = gemm.on_rank(tp_size)
        name = gemm.name.split(".", 3)[-1]
        if not gemm.in_fp8 or (name, shape) in seen:
            continue
        seen.add((name, shape))
        for what, size in zip(("inputs", "outputs"), shape, strict=True):
            # Both are a contiguous dimension in one of the three products.
            if size % FP8_COLUMNS_MULTIPLE:
                yield (
                    f"{name} has {size} {what} on each of parallel.tensor_parallel_size={tp_size} ranks; FP8 takes "
                    f"multiples of {FP8_COLUMNS_MULTIPLE} (and of {FP8_ROWS_MULTIPLE} rows), such as "
                    f"{next_multiple(size, FP8_COLUMNS_MULTIPLE)}. Change the model's sizes"
                    f"{_heads_that_fit(config.model, tp_size) if name == 'mixer.in_proj' else ''} or precision.format."
                )


def _heads_that_fit(model: ModelSection, tp_size: int) -> str:
    """Name the next number of Mamba heads with which the projection into the mixer can be multiplied in FP8."""
    groups = model.mamba_num_groups
    for heads in range(model.mamba_num_heads + 1, model.mamba_num_heads + 16 * groups * tp_size + 1):
        rows = 2 * heads * model.mamba_head_dim + 2 * groups * model.mamba_state_dim + heads
        if heads % groups == 0 and heads % tp_size == 0 and rows % (FP8_COLUMNS_MULTIPLE * tp_size) == 0:
            return f" (model.mamba_num_heads={heads} would do)"
    return ""


def fp8_products_are_aligned_where_sequences_are_split(config: RunConfig, world_size: int) -> Iterator[str]:
    # Transformer Engine 2 quantises a rank's part of the sequence before it gathers the whole, and asks for whole
    # blocks there.
    precision, parallel = config.precision, config.parallel
    ranks = parallel.tensor_parallel_size * parallel.context_parallel_size
    if not (precision.format.is_fp8 and parallel.sequence_parallel and parallel.tensor_parallel_size > 1):
        return
    cp_size = parallel.context_parallel_size
    shared = f" x parallel.context_parallel_size={cp_size}" if cp_size > 1 else ""
    in_blocks = precision.format is PrecisionFormat.fp8_block
    multiple = FP8_BLOCK if in_blocks else FP8_ROWS_MULTIPLE
    for key, length in sample_lengths(config):
        tokens = length * config.train.micro_batch_size
        if tokens % (ranks * multiple):
            yield (
                f"{key}={length} x train.micro_batch_size={config.train.micro_batch_size} = {tokens} tokens are split "
                f"over parallel.tensor_parallel_size={parallel.tensor_parallel_size}{shared} ranks, and "
                f"{precision.format.value} takes multiples of {multiple} tokens there. "
                f"Use {nearest_multiples(tokens, ranks * multiple)} tokens, or parallel.sequence_parallel=false."
            )
    if in_blocks and config.model.hidden_size % FP8_BLOCK:
        yield (
            f"model.hidden_size={config.model.hidden_size} is not a multiple of the {FP8_BLOCK} that share a scale in "
            f"fp8_block, which parallel.sequence_parallel=true asks for. "
            f"Use {nearest_multiples(config.model.hidden_size, FP8_BLOCK)}, or parallel.sequence_parallel=false."
        )


def bf16_state_needs_bf16_weights(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.precision.format is not PrecisionFormat.fp32:
        return
    for key in ("gradients", "moments"):
        if getattr(config.optim, key) is StateFormat.bf16:
            yield f"optim.{key}=bf16 is not possible with precision.format=fp32. Set it to fp32, or the format to bf16."


def _pattern(config: RunConfig) -> ParsedPattern | None:
    try:
        return parse_pattern(config.model.layer_pattern)
    except ConfigError:
        return None  # `rules.pattern_is_readable_and_can_be_cut` says what is wrong with it


PRECISION_RULES = (
    fp8_keys_need_fp8,
    some_layers_run_in_fp8,
    delayed_scaling_covers_all_layers,
    delayed_scaling_keeps_bf16_weights,
    fp8_products_are_aligned,
    fp8_products_are_aligned_where_sequences_are_split,
    bf16_state_needs_bf16_weights,
)
