"""Which matrix product of the model runs in which precision, and why? Decided here, once, for all who ask.

FP8 covers the linear layers of the pattern and nothing else. Embedding, output layer, norms, attention scores and scan
keep the precision of the weights in every published recipe (arXiv 2509.25149, section 4.1 and appendix A.1).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron_train.config.schema import ModelSection, PrecisionSection, RunConfig
from nemotron_train.plan.pattern import LayerKind, ParsedPattern

FP8_ROWS_MULTIPLE, FP8_COLUMNS_MULTIPLE = 8, 16  # what FP8 products on Hopper ask of a matrix (Transformer Engine 2)
FP8_BLOCK = 128  # side of a block with one scale; rows and tokens that do not fill one are slow


@dataclass(frozen=True)
class Gemm:
    """One linear layer of the whole model: a product forward, and two backward."""

    name: str  # of its weight, without `.weight`
    inputs: int
    outputs: int
    splits_inputs: bool  # tensor parallelism splits the inputs (row-parallel), else the outputs
    in_fp8: bool
    reason: str  # why not in FP8; empty for those that are

    def on_rank(self, tp_size: int) -> tuple[int, int]:
        """Return inputs and outputs of one tensor-parallel rank's share."""
        if self.splits_inputs:
            return self.inputs // tp_size, self.outputs
        return self.inputs, self.outputs // tp_size


def fp8_layers(precision: PrecisionSection, num_layers: int) -> range:
    """Return the numbers (from 0) of the layers whose linear layers run in FP8."""
    if not precision.format.is_fp8:
        return range(0)
    return range(precision.bf16_first_layers, num_layers - precision.bf16_last_layers)


def list_gemms(config: RunConfig, pattern: ParsedPattern) -> tuple[Gemm, ...]:
    """Return all linear layers, from input to output."""
    in_fp8 = fp8_layers(config.precision, len(pattern.layers))
    gemms = []
    for number, kind in enumerate(pattern.layers):
        reason = _reason(config.precision, number, in_fp8)
        for name, inputs, outputs, splits_inputs in _linears(kind, config.model):
            full_name = f"decoder.layers.{number}.{name}"
            gemms.append(Gemm(full_name, inputs, outputs, splits_inputs, number in in_fp8, reason))
    head = "the output layer stays in the precision of the weights"
    gemms.append(Gemm("output_layer", config.model.hidden_size, config.model.vocab_size, False, False, head))
    return tuple(gemms)


def _reason(precision: PrecisionSection, number: int, in_fp8: range) -> str:
    if number in in_fp8:
        return ""
    if not precision.format.is_fp8:
        return f"precision.format={precision.format.value}"
    if number < in_fp8.start:
        return f"one of precision.bf16_first_layers={precision.bf16_first_layers}"
    return f"one of precision.bf16_last_layers={precision.bf16_last_layers}"


def _linears(kind: LayerKind, model: ModelSection) -> Iterator[tuple[str, int, int, bool]]:
    """Yield name, inputs, outputs and whether inputs are split, of a layer's linear layers."""
    hidden = model.hidden_size
    if kind is LayerKind.mamba:
        inner = model.mamba_num_heads * model.mamba_head_dim
        packed = 2 * inner + 2 * model.mamba_num_groups * model.mamba_state_dim + model.mamba_num_heads
        yield "mixer.in_proj", hidden, packed, False
        yield "mixer.out_proj", inner, hidden, True
    elif kind is LayerKind.attention:
        queries = model.num_attention_heads * model.attention_head_dim
        keys_and_values = 2 * model.num_query_groups * model.attention_head_dim
        yield "self_attention.linear_qkv", hidden, queries + keys_and_values, False
        yield "self_attention.linear_proj", queries, hidden, True
    else:
        yield "mlp.linear_fc1", hidden, model.ffn_hidden_size, False
        yield "mlp.linear_fc2", model.ffn_hidden_size, hidden, True
