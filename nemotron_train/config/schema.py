"""Every key a user may set, with its type, unit, range and origin: this file is the reference manual of the recipes.

A `RunConfig` is what was asked, never what follows from it (that is `plan.RunPlan`). Lengths are in tokens. `None`
means "not asked":
the plan fills it in, or the key has no meaning for the chosen schedule. Rules across keys live in `plan/rules.py`.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

ROPE_BASE = 10000.0  # of model.rope_base, where it is not asked for: RoFormer's and Megatron-Core's


class Initialization(str, Enum):
    """How weights start. The two differ in the projections that write to the residual stream (std `init_std`
    elsewhere)."""

    gpt = "gpt"  # init_std / sqrt(2 x layers): a Transformer block adds to the residual twice (as Megatron-LM's GPT)
    nemotron_h = "nemotron_h"  # init_std / sqrt(layers): a layer adds to it once (Megatron-LM is_hybrid_model)


class Norm(str, Enum):
    """The norm before every layer, after the last one, and wherever else the model has one."""

    rms = "rms"  # x / rms(x) times a weight (Nemotron-H, Nano 2)
    layer = "layer"  # LayerNorm: the mean taken off first, and a bias added


class PositionEmbedding(str, Enum):
    """Where attention gets the order of the tokens from."""

    none = "none"  # from the Mamba layers (Nemotron-H, Nano 2)
    learned = "learned"  # a learned vector for each place in the sample, or document, added to the embedding
    rope = "rope"  # queries and keys are rotated by their place (RoFormer, arXiv 2104.09864), all channels of a head


class QkvNorm(str, Enum):
    """Norms between the projection and attention, over the channels of each head (arXiv 2410.16682)."""

    none = "none"
    qk = "qk"  # of queries and keys
    qkv = "qkv"  # of queries, keys and values, in place of the norm before the layer


class PrecisionFormat(str, Enum):
    """What the matrix products of the layers compute in. With FP8 all else is as with bf16: embedding, output layer,
    norms, attention scores, scan, and the layers named by `bf16_first_layers` and `bf16_last_layers`."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8_block = "fp8_block"  # E4M3; a scale for 1x128 of activations and gradients, 128x128 of weights (Nano 2)
    fp8_current = "fp8_current"  # a scale for a tensor, from its own maximum; gradients in E5M2 (Nemotron-H §2.3)
    fp8_delayed = "fp8_delayed"  # a scale for a tensor, from the maxima of earlier steps; gradients in E5M2

    @property
    def is_fp8(self) -> bool:
        return self.value.startswith("fp8")


class Fp8Scales(str, Enum):
    """Which numbers the scales of FP8 tensors are."""

    fp32 = "fp32"  # the maximum lands on the format's largest number
    power_of_two = "power_of_two"  # rounded down to one: scaling is exact, up to one bit of the range is unused


class PrimaryWeights(str, Enum):
    """What ranks hold the weights of FP8 layers in. Master weights are in float32, split over ranks, either way."""

    bf16 = "bf16"  # and FP8 copies of them, made anew in every step
    fp8 = "fp8"  # only: the optimizer's update writes them, and they are gathered in half the bytes


class StateFormat(str, Enum):
    """What a number of the optimizer is stored in."""

    fp32 = "fp32"
    bf16 = "bf16"


class LrSchedule(str, Enum):
    wsd = "wsd"  # warm up, hold the peak, decay over the last `decay_tokens`
    cosine = "cosine"  # warm up, then one half cosine from peak to min until `train_tokens`
    constant = "constant"  # warm up, then hold the peak


class DecayShape(str, Enum):
    """The decay of a `wsd` schedule, named as in Megatron-Core's `lr_wsd_decay_style`."""

    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"
    minus_sqrt = "minus_sqrt"  # 1 - sqrt(progress)


class Recompute(str, Enum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"  # the inside of every Mamba mixer and attention core; their projections are kept
    full = "full"  # every layer keeps only its input


class DocumentBoundary(str, Enum):
    """What the model sees of the documents that are packed into one sample."""

    none = "none"  # one text: attention and scan run across documents, as in the published runs
    reset = "reset"  # each document on its own; the first token of a document is not predicted from the one before


class WandbMode(str, Enum):
    off = "off"
    offline = "offline"
    online = "online"


@dataclass(frozen=True)
class RunSection:
    name: str = MISSING  # what the run is called in titles and in wandb
    dir: str = "runs/${run.name}"  # everything the run writes; start the same command again to go on from it
    seed: int = 1234  # initial weights and data order follow from it; >= 0


@dataclass(frozen=True)
class ModelSection:
    """The hybrid stack. Names are Megatron-Core's. Numbers of the published models: see the recipes."""

    layer_pattern: str = MISSING  # one letter a layer: M Mamba-2, * attention, - MLP; `|` marks pipeline cuts by hand
    hidden_size: int = MISSING  # channels of the residual stream, what every layer reads and adds to
    ffn_hidden_size: int = MISSING  # inner width of the squared-ReLU MLP
    num_attention_heads: int = MISSING  # of an attention layer; their width together need not be hidden_size
    num_query_groups: int = MISSING  # key/value heads
    attention_head_dim: int = MISSING  # channels of an attention head, of queries, keys and values alike
    mamba_num_heads: int = MISSING  # of a Mamba layer; times mamba_head_dim they are its inner width
    mamba_head_dim: int = MISSING  # channels of a Mamba head that share one step size and one decay
    mamba_num_groups: int = MISSING  # groups that share B and C; also the groups of the gated norm
    mamba_state_dim: int = MISSING  # numbers of state for every channel
    mamba_conv_kernel: int = 4  # tokens that the convolution before the scan sees, the present one included
    mamba_chunk_size: int = 128  # tokens the SSD scan takes at once: speed and memory only, the result is the same
    vocab_size: int = MISSING  # rows of the embedding; at least the tokenizer's size, divisible by tensor_parallel_size
    tied_embeddings: bool = False  # the output layer uses the embedding's weights
    norm: Norm = Norm.rms
    norm_epsilon: float = 1e-5  # added to the mean square in every norm; the released configurations' value
    linear_bias: bool = False  # the projections of attention and MLP layers have biases; the output layer never has
    position_embedding: PositionEmbedding = PositionEmbedding.none
    max_position_embeddings: int | None = None  # `learned` only: places there are vectors for
    rope_base: float | None = None  # `rope` only: channels turn once in 6 to 6 x rope_base tokens; not asked: 10000
    qkv_norm: QkvNorm = QkvNorm.none
    output_norm: bool = False  # every layer's output is normed before it is added (after Proj and FC2 of the paper)
    attention_logit_scale: float = 1.0  # softmax(scale * logit), logit = q k / sqrt(head dim); soft_temp of the paper
    attention_logit_cap: float | None = None  # softmax(cap * tanh(logit / cap)); attention is then not fused, and slow
    layer_scale: float | None = None  # first value of a learned factor for every channel of a layer's output
    initialization: Initialization = Initialization.nemotron_h
    init_std: float = 0.02  # the papers state none; 0.02 is initializer_range of the released configurations


@dataclass(frozen=True)
class ParallelSection:
    """How one model replica is cut over ranks; data parallelism takes the ranks that are left."""

    tensor_parallel_size: int = 1  # ranks that share every layer: heads, groups and MLP columns divide among them
    pipeline_parallel_size: int = 1  # stages of consecutive layers, each on ranks of its own
    virtual_pipeline_size: int = 1  # model chunks per pipeline rank (interleaved schedule)
    context_parallel_size: int = 1  # ranks that share out the tokens of each sample, in two runs each; for long samples
    sequence_parallel: bool = False  # norms and residuals split over the sequence between tensor-parallel regions
    overlap_grad_reduce: bool = True  # reduce gradients while the backward pass runs
    overlap_param_gather: bool = False  # gather updated weights while the next forward pass runs
    overlap_tensor_comm: bool = False  # exchange while products run: sequence parallel, within a node, not fp8_block
    timeout_seconds: int = 600  # a collective that waits longer fails the run


@dataclass(frozen=True)
class PrecisionSection:
    """Which matrix products run in which format; the run prints the list when it starts."""

    format: PrecisionFormat = PrecisionFormat.bf16
    bf16_first_layers: int = 0  # FP8 only: layers of the pattern, from the input on, whose products stay in bf16
    bf16_last_layers: int = 0  # the same, before the output
    fp8_scales: Fp8Scales | None = None  # not asked: power_of_two for fp8_block, fp32 for the others, as in TE
    primary_weights: PrimaryWeights = PrimaryWeights.bf16  # fp8: only fp8_block and fp8_current, on GPUs


@dataclass(frozen=True)
class SourceConfig:
    """A body of text with one weight in the blend: shards (`PREFIX.bin` + `PREFIX.idx`) read as one stream of
    tokens."""

    name: str = MISSING  # by which phases, figures and pictures call it
    prefixes: list[str] = field(default_factory=list)  # under data.path unless absolute; `*` expands, sorted by name
    eval_prefixes: list[str] = field(default_factory=list)  # held-out shards of this source; may be empty


@dataclass(frozen=True)
class SourceWeight:
    source: str = MISSING  # one of the names in data.sources
    weight: float = MISSING  # >= 0; the weights of a phase are normalised to a sum of 1
    fim_rate: float = 0.0  # of its documents that are rearranged for fill-in-the-middle, 0 to 1


@dataclass(frozen=True)
class PhaseConfig:
    """From `start_tokens` on (until the next phase) sources are drawn with these weights."""

    start_tokens: int = MISSING  # 0 for the first phase, rising
    weights: list[SourceWeight] = field(default_factory=list)  # the sources that are read, and how much of each
    seq_length: int | None = None  # tokens of a sample; not asked: train.seq_length. A power of two times the first's


@dataclass(frozen=True)
class DataSection:
    path: str = MISSING  # folder the prefixes and the tokenizer are relative to
    tokenizer: str = "tokenizer.json"  # of the tokens in the shards; its size is checked against model.vocab_size
    sources: list[SourceConfig] = field(default_factory=list)
    phases: list[PhaseConfig] = field(default_factory=list)
    document_boundary: DocumentBoundary = DocumentBoundary.none
    eod_token: str = "<|endoftext|>"  # ends documents; read where boundaries or fill-in-the-middle need it
    fim_spm_rate: float = 0.5  # of rearranged documents: suffix first; the others prefix first (arXiv 2207.14255)
    fim_tokens: list[str] = field(default_factory=list)  # of the tokenizer: before prefix, suffix and middle
    max_epochs: float = 8.0  # refuse a blend that repeats a source more often (Nemotron-H §2.2 stays within 4 to 8)


@dataclass(frozen=True)
class OptimSection:
    """AdamW with decoupled weight decay. Defaults: Nemotron-H §2.4, Nano 2; epsilon and clipping: Megatron-Bridge."""

    adam_beta1: float = 0.9  # decay of the mean of gradients a step, below 1
    adam_beta2: float = 0.95  # decay of the mean of squared gradients a step, below 1
    adam_epsilon: float = 1e-8  # added to the root of that mean
    weight_decay: float = 0.1  # not applied to norms, biases, A_log, D, dt_bias, layer_scale
    clip_grad_norm: float = 1.0  # 0 = no clipping
    gradients: StateFormat = StateFormat.fp32  # what micro-batches are summed and ranks are reduced in
    moments: StateFormat = StateFormat.fp32  # both of AdamW's; bf16 saves memory, and no published run did it


@dataclass(frozen=True)
class LrSection:
    """Learning rate as a function of the tokens consumed before a step."""

    schedule: LrSchedule = MISSING
    peak: float = MISSING  # the largest rate, reached after warmup_tokens
    min: float | None = None  # value at and after train_tokens; not for `constant`
    warmup_tokens: int = 0  # linear from 0 to peak
    decay_tokens: int | None = None  # `wsd` only: length of the decay that ends at train_tokens
    decay_shape: DecayShape | None = None  # `wsd` only


@dataclass(frozen=True)
class BatchStep:
    start_tokens: int = MISSING  # above 0, rising
    global_batch_size: int = MISSING  # samples of an optimizer step from there on


@dataclass(frozen=True)
class TrainSection:
    train_tokens: int = MISSING  # the run takes as many whole steps as fit
    seq_length: int = MISSING  # tokens of a sample, where data.phases[].seq_length asks for no other; of evaluation
    global_batch_size: int = MISSING  # samples of an optimizer step, all ranks
    micro_batch_size: int = 1  # samples of one forward and backward on one rank: speed and memory only
    batch_schedule: list[BatchStep] = field(default_factory=list)  # other global batch sizes from given tokens on
    eval_every_steps: int = 0  # 0 = never; the end of a run with held-out shards is always evaluated
    eval_tokens: int = 1_000_000  # of each source's held-out shards (less where they hold less)
    recompute: Recompute = Recompute.none
    cuda_graphs: bool = False  # start passes as CUDA graphs, for GPUs that wait for the CPU: small shares, FP8
    deterministic: bool = False  # the same run gives the same bits every time on GPUs too, stopped and resumed or not
    max_skipped_steps: int = 10  # stop when more steps than this in a row were skipped for non-finite gradients


@dataclass(frozen=True)
class CheckpointSection:
    every_steps: int = 0  # 0 = only at the end and when stopped by a signal
    resume: str = "auto"  # auto: the newest good one in run.dir; never: refuse one; FOLDER: where a new run starts from
    asynchronous: bool = False  # write beside training, which waits only while its state is copied
    keep_last: int = 0  # delete older ones but the newest so many; 0 = keep all
    keep_every_tokens: int = 0  # with keep_last: of each stretch of so many tokens the first stays too; 0 = none
    allow_change: list[str] = field(default_factory=list)  # keys, or sections, that may differ from the checkpoint's


@dataclass(frozen=True)
class LogSection:
    every_steps: int = 1  # metrics.jsonl and the console take every so many steps (the last step always)
    wandb: WandbMode = WandbMode.off  # whether the run is shown on Weights & Biases too
    wandb_project: str = "nemotron-train"  # where runs are listed; log.wandb says whether


@dataclass(frozen=True)
class RunConfig:
    """What was asked for. Frozen: what follows from it goes into `plan.RunPlan`."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    lr: LrSection = field(default_factory=LrSection)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    log: LogSection = field(default_factory=LogSection)
