"""What was measured on a GPU, and what is assumed of one: the table behind every time that the planner states.

Measured on one H200 (torch 2.11.0+cu130, Transformer Engine 2.11.0, mamba-ssm 2.3.2, causal-conv1d 1.6.2), samples of
8,192 tokens, micro-batch 1, the layers of Nemotron Nano 12B v2 at full width. Times of single layers are those of
Megatron-Core 0.16.1's own hybrid model, which our layers were within 3 % of; they hold no change made to the kernels
since. Everything about other cards, and about networks, is from data sheets and marked so.
"""

from dataclasses import dataclass

from nemotron_train.config.schema import ModelSection, PrecisionFormat
from nemotron_train.plan.pattern import LayerKind

REFERENCE_TOKENS = 8192
REFERENCE_MODEL = ModelSection(  # recipes/model/nemotron_nano_12b_v2.yaml
    layer_pattern="M*-",
    hidden_size=5120,
    ffn_hidden_size=20480,
    num_attention_heads=40,
    num_query_groups=8,
    attention_head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    mamba_num_groups=8,
    mamba_state_dim=128,
    vocab_size=131072,
)

# Milliseconds of one layer of the reference, forward and backward: stacks of four layers, median of 8 (2026-11-22).
LAYER_MS: dict[LayerKind, dict[PrecisionFormat, float]] = {
    LayerKind.mamba: {PrecisionFormat.bf16: 17.3, PrecisionFormat.fp8_block: 13.9, PrecisionFormat.fp8_current: 13.0},
    LayerKind.mlp: {PrecisionFormat.bf16: 15.6, PrecisionFormat.fp8_block: 11.3, PrecisionFormat.fp8_current: 9.9},
    LayerKind.attention: {PrecisionFormat.bf16: 10.0, PrecisionFormat.fp8_block: 9.0, PrecisionFormat.fp8_current: 8.7},
}
# Of these, what is not a matrix product of a linear layer, from a profile of an 18-layer slice (8 Mamba, 8 MLP and 2
# attention layers; the same day): convolution, scan and gated norm 46 ms, attention 10 ms, norms and residuals 8 ms.
CORE_MS = {LayerKind.mamba: 46 / 8, LayerKind.attention: 10 / 2, LayerKind.mlp: 0.0}
NORM_AND_RESIDUAL_MS = 8 / 18
# Embedding, final norm, output layer and loss: what our slice (2026-11-24) took beyond its layers and its pass over the
# gradients, mean of 60.3 in bf16 (356.7 ms) and 55.6 in fp8_block (288.4 ms); the output layer is in bf16 in both.
HEAD_MS = 58.0
# AdamW with float32 moments and gradients, with norm and clipping, on the 4.494B parameters of that slice: its whole
# step (403 ms, bf16) less forward and backward.
OPTIMIZER_SECONDS_PER_PARAMETER = 46.3e-3 / 4.494e9
OPTIMIZER_BYTES_PER_PARAMETER = (
    42  # master and moments read and written, gradients read thrice, clipped; weights written
)
# Whole 12B on two GPUs at tensor-parallel size 2 without overlap (2026-11-22; 6,302, 6,994 and 7,385 tokens/s a GPU):
# milliseconds a layer and micro-batch of 8,192 tokens beyond half a layer, its traffic, and the optimizer's step.
# Narrower products, and quantising what every rank holds whole.
TENSOR_PARALLEL_MS = {
    PrecisionFormat.bf16: 0.85,
    PrecisionFormat.fp8_block: 1.5,
    PrecisionFormat.fp8_current: 1.55,
}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU in nodes of eight. Bandwidths in bytes a second and one direction."""

    name: str
    memory_gib: float  # what the driver shows
    memory_bandwidth: float  # data sheet
    node_bandwidth: float  # NVLink 4, data sheet
    network_bandwidth: float  # one 400 Gbit/s adapter for every GPU, as in DGX H100; assumed
    source: str


H200 = Gpu("H200", 140.4, 4.8e12, 450e9, 50e9, "layer times measured; networks from data sheets")
H100 = Gpu("H100", 79.6, 3.35e12, 450e9, 50e9, "times of H200, which has the same compute units, with kernels bound by "
           "memory slowed by the ratio of bandwidths: derived, nothing measured")  # fmt: skip
GPUS = {"h200": H200, "h100": H100}
GPUS_PER_NODE = 8
REACHED_FRACTION = 0.7  # of a bandwidth between GPUs, in large collectives; assumed
OUTSIDE_TORCH_GIB = 3.0  # CUDA context, libraries, NCCL's buffers: not in torch's count of allocated memory; assumed
