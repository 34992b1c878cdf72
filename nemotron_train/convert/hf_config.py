"""How do our model section and Hugging Face's `config.json` of a NemotronH say the same?

One table serves both directions. Written are the keys of the released models (`hybrid_override_pattern`, which both
transformers and the code beside the released weights read); read is whatever transformers reads.
"""

from typing import Any

import torch
from transformers import NemotronHConfig

from nemotron_train.config.schema import Initialization, ModelSection
from nemotron_train.convert.hf_names import HfNames
from nemotron_train.errors import ConfigError
from nemotron_train.plan.architecture_rules import beyond_nemotron_h

# Our key -> theirs, where the value is the same.
SAME = {
    "layer_pattern": "hybrid_override_pattern",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "attention_head_dim": "head_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
    "mamba_conv_kernel": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "norm_epsilon": "layer_norm_epsilon",
    "init_std": "initializer_range",
}
# What our model is and a NemotronH might not be: their key -> the only value we have.
FIXED: dict[str, Any] = {
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "sliding_window": None,
    "num_nextn_predict_layers": 0,
}
# What the released configurations say besides, and a training run here does not decide.
RELEASED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "residual_in_fp32": False,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "num_logits_to_keep": 1,
    "use_cache": True,
    "use_mamba_kernels": True,
}
# transformers takes time_step_min, made for choosing the first dt_bias, as a floor of dt in the forward pass. Neither
# Megatron-Core nor the code beside the released weights has a floor. 0 would be the same as none, but transformers
# takes its logarithm while it builds a model.
NO_FLOOR = 1e-30
# `time_step_limit`, which the code beside the released weights does clamp with, is left at its default (0, infinity):
# JSON has no infinity.


def names_of(model: ModelSection) -> HfNames:
    """Return the map of parameter names of a model."""
    return HfNames(
        layer_pattern=model.layer_pattern.replace("|", ""),
        num_query_groups=model.num_query_groups,
        attention_head_dim=model.attention_head_dim,
        tied_embeddings=model.tied_embeddings,
    )


def check_is_nemotron_h(model: ModelSection) -> None:
    """Raise ConfigError if the model has parts that a NemotronH cannot have; names all of them."""
    beyond = ", ".join(f"model.{key}={value}" for key, value in beyond_nemotron_h(model).items())
    if beyond:
        raise ConfigError(f"This model cannot be exported: a NemotronH has nothing like {beyond}.")


def hugging_face_config(
    model: ModelSection, dtype: torch.dtype, *, eos_token_id: int | None = None, max_length: int | None = None
) -> dict[str, Any]:
    """Return the contents of `config.json`.

    Args:
        dtype: what most weights are stored in; transformers loads them in it unless told otherwise.
        eos_token_id: ends a document.
        max_length: in tokens; the model has no limit, but serving programs want one.
    """
    values = {theirs: getattr(model, ours) for ours, theirs in SAME.items()}
    values["hybrid_override_pattern"] = model.layer_pattern.replace("|", "")
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "torch_dtype": str(dtype).removeprefix("torch."),
        **values,
        "num_hidden_layers": len(values["hybrid_override_pattern"]),
        **FIXED,
        **RELEASED,
        "time_step_min": NO_FLOOR,
        "rescale_prenorm_residual": model.initialization is Initialization.nemotron_h,
        **({"max_position_embeddings": max_length} if max_length else {}),
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
    }


def model_section(config: NemotronHConfig) -> ModelSection:
    """Return the model that a Hugging Face configuration describes.

    Raises:
        ConfigError: it has parts that our model does not have; names all of them.
    """
    problems = [
        f"{key}={getattr(config, key)!r}, only {value!r} is known"
        for key, value in FIXED.items()
        if getattr(config, key) != value
    ]
    unknown = sorted(set(config.hybrid_override_pattern) - set("M*-"))
    if unknown:
        problems.append(f"the pattern {config.hybrid_override_pattern} has layers {unknown}, only M, * and - are known")
    if problems:
        raise ConfigError(f"This NemotronH cannot be imported: {'; '.join(problems)}.")
    values = {ours: getattr(config, theirs) for ours, theirs in SAME.items()}
    # The first released configurations call it so, and transformers keeps it as a key it does not know.
    values["attention_head_dim"] = getattr(config, "attention_head_dim", values["attention_head_dim"])
    rescaled = config.rescale_prenorm_residual
    return ModelSection(**values, initialization=Initialization.nemotron_h if rescaled else Initialization.gpt)
