"""Initial weights, as a function of (seed, parameter name) alone: every layout starts from the same model.

Sources: normal(init_std) and the scaled output projections are Megatron-Core's (`init_method_normal`,
`scaled_init_method_normal` with `is_hybrid_model`); convolution, dt_bias, A_log and D are Mamba-2's (arXiv 2405.21060
and its released code), as Megatron-Core's mixer has them.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from nemotron_train.config.schema import Initialization, ModelSection
from nemotron_train.model.names import ParameterRule, Start, part_rows, rule_for

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # softplus(dt_bias) starts log-uniform in this range
A_RANGE = (1.0, 16.0)  # -A starts uniform in this range


def initialize_weights(
    chunk: nn.Module, model: ModelSection, *, seed: int, num_layers: int, tp_rank: int, tp_size: int
) -> None:
    """Fill this rank's parameters in place and mark those that are split. `num_layers` is the depth of the whole
    model."""
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            rule = rule_for(name)
            # A tied output layer on the last pipeline stage is a copy of the embedding.
            source = (
                "embedding.word_embeddings.weight" if model.tied_embeddings and name == "output_layer.weight" else name
            )
            generator = torch.Generator(device=parameter.device).manual_seed(_seed_of(seed, source))
            shape = list(parameter.shape)
            if rule.split_dim is not None:
                shape[rule.split_dim] *= tp_size
            whole = _draw(rule.start, shape, model, num_layers, generator)
            value = take_shard(whole, rule, model, tp_rank, tp_size).to(parameter.dtype)
            parameter.copy_(value)  # a weight that lives in FP8 quantises it, from bfloat16 as in every later step
            if hasattr(parameter, "_high_precision_init_val"):
                # Of such a weight the optimizer makes its master weights from this, and drops it.
                parameter._high_precision_init_val = value.cpu()
            # The gradient norm counts a parameter on every tensor-parallel rank if it is marked as split, else on the
            # first. Transformer Engine has marked its own already, which Megatron-Core's setter does not take.
            parameter.tensor_model_parallel = rule.split_dim is not None
            parameter.partition_dim, parameter.partition_stride = rule.split_dim or 0, 1


def take_shard(whole: Tensor, rule: ParameterRule, model: ModelSection, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a whole parameter that tensor-parallel rank `tp_rank` holds."""
    if rule.split_dim is None or tp_size == 1:
        return whole
    parts = whole.split(part_rows(rule.parts, model), dim=rule.split_dim) if rule.parts else [whole]
    return torch.cat([part.chunk(tp_size, dim=rule.split_dim)[tp_rank] for part in parts], dim=rule.split_dim)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes seeds below 2^63


def _draw(start: Start, shape: list[int], model: ModelSection, num_layers: int, generator: torch.Generator) -> Tensor:
    values = torch.empty(shape, dtype=torch.float32, device=generator.device)
    if start is Start.normal:
        return values.normal_(0.0, model.init_std, generator=generator)
    if start is Start.residual:
        adds_per_layer = 2.0 if model.initialization is Initialization.gpt else 1.0
        return values.normal_(0.0, model.init_std / math.sqrt(adds_per_layer * num_layers), generator=generator)
    if start is Start.conv:
        bound = 1.0 / math.sqrt(model.mamba_conv_kernel)  # torch.nn.Conv1d's default for weight and bias
        return values.uniform_(-bound, bound, generator=generator)
    if start is Start.dt_bias:
        dt = torch.exp(values.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator)).clamp(min=DT_FLOOR)
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if start is Start.a_log:
        return values.uniform_(*A_RANGE, generator=generator).log_()
    if start is Start.layer_scale:
        assert model.layer_scale is not None, "there is no such parameter otherwise"
        return values.fill_(model.layer_scale)
    return values.fill_(1.0 if start is Start.ones else 0.0)
