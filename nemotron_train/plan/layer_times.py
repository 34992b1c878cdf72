"""How long does each layer take on one GPU, forward and backward of one micro-batch?

The times of a GPU's table (`gpu_table.py`) are parted into matrix products, the core of a mixer or of
attention, and what passes over the residual; each part grows with its own amount of work. At the shape that was
measured the sum is the measured time, unless starting the kernels takes longer.
"""

from dataclasses import dataclass

from nemotron_train.config.schema import ModelSection, PrecisionFormat, Recompute, RunConfig
from nemotron_train.plan.gpu_table import Gpu
from nemotron_train.plan.measured import H200
from nemotron_train.plan.pattern import LayerKind, ParsedPattern
from nemotron_train.plan.pipeline_cut import StageCosts
from nemotron_train.plan.precision_map import fp8_layers
from nemotron_train.plan.rank_share import RankTokens, share_of_rank, tokens_on_rank
from nemotron_train.plan.sizes import (
    attention_forward_flops,
    attention_weights,
    mamba_forward_flops,
    mamba_weights,
    mlp_weights,
)

FORWARD_FRACTION = 1 / 3  # of a layer's time: the backward pass makes twice as many products


@dataclass(frozen=True)
class LayerSeconds:
    """One layer, one micro-batch, one rank."""

    products: float  # linear layers, quantisation included
    core: float  # convolution, scan and gated norm; or attention
    elementwise: float  # norm and residual
    tensor_parallel: float  # what splitting the layer costs besides traffic
    forward_launch: float  # what the CPU takes to start the kernels, beside the GPU's work
    backward_launch: float

    @property
    def total(self) -> float:
        return self.forward + max((1 - FORWARD_FRACTION) * self._work, self.backward_launch)

    @property
    def forward(self) -> float:
        """The GPU's work, or the CPU's where it starts the kernels of a small share more slowly than they run; so too
        backward."""
        return max(FORWARD_FRACTION * self._work, self.forward_launch)

    @property
    def _work(self) -> float:
        return self.products + self.core + self.elementwise + self.tensor_parallel


def layer_seconds(
    kind: LayerKind, format: PrecisionFormat, config: RunConfig, seq_length: int, gpu: Gpu
) -> LayerSeconds:
    """Scale the measured layer to this model, sample length, micro-batch and tensor-parallel size."""
    tokens, tp_size = tokens_on_rank(config, seq_length), config.parallel.tensor_parallel_size
    share = share_of_rank(config.model, tp_size)
    format = measured_format(format)
    products = gpu.layer_ms_in(kind, format) - gpu.core_ms[kind] - gpu.norm_and_residual_ms
    core = gpu.core_ms[kind] * (gpu.memory_slowdown if kind is LayerKind.mamba else 1.0)
    split = gpu.tensor_parallel_ms[format] * _times(tokens, gpu) if tp_size > 1 else 0.0
    # A graph starts itself.
    forward_launch, backward_launch = (0.0, 0.0) if config.train.cuda_graphs else gpu.launch_ms[kind][format]
    return LayerSeconds(
        products=1e-3 * products * _weights(kind, share) / _weights(kind, gpu.model) * _times(tokens, gpu),
        core=1e-3 * core * _core_ratio(kind, share, seq_length, gpu) * _times(tokens, gpu),
        elementwise=1e-3
        * gpu.norm_and_residual_ms
        * gpu.memory_slowdown
        * (tokens.residual / gpu.tokens)
        * (share.hidden_size / gpu.model.hidden_size),
        tensor_parallel=1e-3 * split,
        forward_launch=1e-3 * forward_launch,
        backward_launch=1e-3 * backward_launch,
    )


def recompute_seconds(kind: LayerKind, seconds: LayerSeconds, recompute: Recompute) -> float:
    """Return what the backward pass computes a second time."""
    if recompute is Recompute.full:
        return seconds.forward
    return FORWARD_FRACTION * seconds.core if recompute is Recompute.selective else 0.0


def head_seconds(config: RunConfig, seq_length: int, gpu: Gpu) -> float:
    """Return embedding, final norm, output layer and loss of one micro-batch; nearly all of it is the output layer."""
    tokens, reference = tokens_on_rank(config, seq_length), gpu.model
    vocabulary = config.model.vocab_size * config.model.hidden_size / config.parallel.tensor_parallel_size
    return 1e-3 * gpu.head_ms * _times(tokens, gpu) * vocabulary / (reference.vocab_size * reference.hidden_size)


def stage_costs(config: RunConfig, pattern: ParsedPattern, seq_length: int, gpu: Gpu = H200) -> StageCosts:
    """Return the seconds of every layer and of the ends: what the pipeline is cut by."""
    in_fp8 = fp8_layers(config.precision, len(pattern.layers))
    by_kind: dict[tuple[LayerKind, bool], float] = {}
    costs = []
    for number, kind in enumerate(pattern.layers):
        key = kind, number in in_fp8
        if key not in by_kind:
            format = config.precision.format if key[1] else PrecisionFormat.bf16
            seconds = layer_seconds(kind, format, config, seq_length, gpu)
            by_kind[key] = seconds.total + recompute_seconds(kind, seconds, config.train.recompute)
        costs.append(by_kind[key])
    return StageCosts(layers=tuple(costs), first=0.0, last=head_seconds(config, seq_length, gpu))


def measured_format(format: PrecisionFormat) -> PrecisionFormat:
    """Return the format whose times stand for this one: float32 only to compare layers with each other."""
    return {
        PrecisionFormat.fp32: PrecisionFormat.bf16,
        PrecisionFormat.fp8_delayed: PrecisionFormat.fp8_current,
    }.get(format, format)


def _times(tokens: RankTokens, gpu: Gpu) -> float:
    return tokens.layer / gpu.tokens


def _weights(kind: LayerKind, model: ModelSection) -> int:
    if kind is LayerKind.mamba:
        return mamba_weights(model)
    return attention_weights(model) if kind is LayerKind.attention else mlp_weights(model)


def _core_ratio(kind: LayerKind, model: ModelSection, seq_length: int, gpu: Gpu) -> float:
    """Return the work of a core per token, relative to the model of the table."""
    if kind is LayerKind.mlp:
        return 0.0
    return _core_flops(kind, model, seq_length) / _core_flops(kind, gpu.model, gpu.tokens)


def _core_flops(kind: LayerKind, model: ModelSection, seq_length: int) -> int:
    if kind is LayerKind.mamba:
        return mamba_forward_flops(model) - 2 * mamba_weights(model)
    return attention_forward_flops(model, seq_length) - 2 * attention_weights(model)
