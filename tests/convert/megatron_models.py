"""The model that goes between Megatron-Core's hybrid and ours in tests: small, with every layer kind."""

from pathlib import Path
from typing import Any

from nemotron_train.config.schema import RunConfig
from tests.small_runs import small_config

MODEL: dict[str, Any] = dict(
    layer_pattern="M-M*",
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    attention_head_dim=8,
    mamba_num_heads=16,  # Megatron-Core wants rows of the packed projection in sixteens
    mamba_head_dim=8,
    mamba_num_groups=4,
    mamba_state_dim=8,
    vocab_size=96,
)


def config_of(run_dir: str | Path, **sections: dict[str, Any]) -> RunConfig:
    return small_config(Path("unused"), Path(run_dir), model=MODEL, **sections)
