"""The only place where our names become Megatron-Core's: `RunPlan` -> TransformerConfig, DDP and optimizer
configuration."""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.config.schema import (
    Norm,
    PrecisionFormat,
    PrimaryWeights,
    QkvNorm,
    Recompute,
    RunConfig,
    StateFormat,
)
from nemotron_train.engine.layer_parts import LayerParts
from nemotron_train.ops.implementations import Operations
from nemotron_train.plan.run_plan import RunPlan
from nemotron_train.precision.recipe import Scaling, fp8_recipe


def weight_dtype(config: RunConfig) -> torch.dtype:
    """What weights are stored in on the ranks that compute with them."""
    return torch.float32 if config.precision.format is PrecisionFormat.fp32 else torch.bfloat16


def _state_dtype(chosen: StateFormat) -> torch.dtype:
    return {StateFormat.fp32: torch.float32, StateFormat.bf16: torch.bfloat16}[chosen]


def _fp8_names(config: RunConfig) -> dict[str, str]:
    """What Megatron-Core calls the FP8 recipe. Our layers enter FP8 themselves (engine/layer_precision.py); without
    these names its schedules would never tell them that a step begins, and they would go on with the FP8 copies of the
    first step's weights."""
    recipe = fp8_recipe(config.precision)
    if recipe is None:
        return {}
    names = {Scaling.block: "blockwise", Scaling.current: "tensorwise", Scaling.delayed: "delayed"}
    return {"fp8": "hybrid" if recipe.wide_gradients else "e4m3", "fp8_recipe": names[recipe.scaling]}


def _holds_fp8_weights(config: RunConfig) -> bool:
    return config.precision.primary_weights is PrimaryWeights.fp8


def _finish_gradients(chunks: list[nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Reduce gradients over ranks. Without the number of tokens, by which Megatron-Core would scale them in one more
    pass over all gradients."""
    finalize_model_grads(chunks, None, **kwargs)


def build_transformer_config(plan: RunPlan, operations: Operations, parts: LayerParts) -> TransformerConfig:
    """Translate model, layout and precision."""
    config = plan.config
    model, parallel = config.model, config.parallel
    pipelined = parallel.pipeline_parallel_size > 1
    interleaved = parallel.virtual_pipeline_size > 1
    dtype, scale = weight_dtype(config), model.attention_logit_scale
    return TransformerConfig(
        num_layers=len(plan.layers),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.attention_head_dim,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_num_groups=model.mamba_num_groups,
        mamba_state_dim=model.mamba_state_dim,
        normalization={Norm.rms: "RMSNorm", Norm.layer: "LayerNorm"}[model.norm],
        layernorm_epsilon=model.norm_epsilon,
        activation_func=operations.squared_relu,
        gated_linear_unit=False,
        add_bias_linear=model.linear_bias,
        # Their weights are the same for all heads, of which each tensor-parallel rank has some: gradients are summed.
        qk_layernorm=model.qkv_norm is not QkvNorm.none,
        softmax_scale=None if scale == 1.0 else scale / math.sqrt(model.attention_head_dim),
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights are filled by name (model/init.py), so that they do not depend on the layout.
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size if interleaved else None,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.overlap_tensor_comm,  # through buffers that engine/user_buffers.py makes
        # With two interleaved stages both neighbours of a rank are the same rank, and batched sends and receives
        # between the two get mixed up; overlapped, unbatched ones do not.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=pipelined and not interleaved,
        # Megatron-Core waits for the GPU after every exchange, against a race of older torch; a graph cannot.
        batch_p2p_sync=not config.train.cuda_graphs,
        recompute_granularity="selective" if config.train.recompute is Recompute.selective else None,
        recompute_modules=["core_attn"],
        **_fp8_names(config),
        fp8_param=_holds_fp8_weights(config),
        gradient_accumulation_fusion=parts.fuses_weight_gradients,
        # The loss comes divided by the real tokens of the global batch (see forward.py): nothing else may divide.
        calculate_per_token_loss=True,
        deterministic_mode=config.train.deterministic,  # of the embedding's gradient
        finalize_model_grads_func=_finish_gradients,
    )


def build_ddp_config(config: RunConfig) -> DistributedDataParallelConfig:
    """Gradients are reduced into the shards of the distributed optimizer."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.optim.gradients is StateFormat.fp32,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_param_gather=_holds_fp8_weights(config),
        check_for_nan_in_grad=False,  # a non-finite gradient skips the step instead (engine/optimizer.py)
        average_in_collective=False,
    )


def build_optimizer_config(config: RunConfig) -> OptimizerConfig:
    """AdamW on float32 master weights, sharded over the data-parallel ranks."""
    optim = config.optim
    dtype = weight_dtype(config)
    return OptimizerConfig(
        optimizer="adam",
        decoupled_weight_decay=True,
        lr=config.lr.peak,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_epsilon,
        clip_grad=optim.clip_grad_norm,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
        # Keeps moments, or gradients, in less than float32, inside Transformer Engine's AdamW.
        use_precision_aware_optimizer=StateFormat.bf16 in (optim.gradients, optim.moments),
        main_grads_dtype=_state_dtype(optim.gradients),
        exp_avg_dtype=_state_dtype(optim.moments),
        exp_avg_sq_dtype=_state_dtype(optim.moments),
        # With a name here Megatron-Core keeps whole float32 master weights also beside moments in less: those of FP8
        # weights cannot be the bits that bfloat16 lacks.
        fp8_recipe=_fp8_names(config)["fp8_recipe"] if _holds_fp8_weights(config) else None,
    )
