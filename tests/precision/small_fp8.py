"""A small run whose sizes FP8 takes on one and on two tensor-parallel ranks, with sequences split too."""

from pathlib import Path
from typing import Any

from nemotron_train.config.schema import PrecisionFormat, RunConfig
from tests.small_runs import small_config

FORMATS = [PrecisionFormat.fp8_block, PrecisionFormat.fp8_current, PrecisionFormat.fp8_delayed]
SEQ, BATCH = 128, 4  # tokens of a sample, samples of a step

TP2_SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
MODEL = dict(
    layer_pattern="M-*-M-",
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    attention_head_dim=32,
    mamba_num_heads=32,
    mamba_head_dim=4,
    mamba_num_groups=2,
    mamba_state_dim=16,
    mamba_chunk_size=32,
)


def fp8_config(
    corpus: Path, run_dir: Path, format: PrecisionFormat, *, steps: int, **sections: dict[str, Any]
) -> RunConfig:
    """`steps` steps of 4 x 128 tokens in two micro-batches; `sections` change fields."""
    merged: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "precision": {"format": format},
        "train": {"seq_length": SEQ, "global_batch_size": BATCH, "train_tokens": steps * SEQ * BATCH},
    }
    for name, changes in sections.items():
        merged[name] = {**merged.get(name, {}), **changes}
    return small_config(corpus, run_dir, **merged)
