"""What single numbers may be: one line for every numeric key. Rules across keys are in `rules.py`."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_train.config.keys import plain
from nemotron_train.config.schema import RunConfig


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end is not in the range itself."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """Say whether a value is inside; NaN and infinity never are."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        text = f"{'above' if self.low_open else 'at least'} {self.low:g}"
        if self.high < math.inf:
            text += f" and {'below' if self.high_open else 'at most'} {self.high:g}"
        return text


COUNT = Range(1)
COUNT_OR_NONE = Range(0)
POSITIVE = Range(0, low_open=True)
FRACTION = Range(0, 1, high_open=True)
SKIPPED_STEPS_KEPT = 1000  # by number, with a run's progress; a longer row of them could not be seen

RANGES = {
    "run.seed": Range(0, 2**63 - 1),
    "model.hidden_size": COUNT,
    "model.ffn_hidden_size": COUNT,
    "model.num_attention_heads": COUNT,
    "model.num_query_groups": COUNT,
    "model.attention_head_dim": COUNT,
    "model.mamba_num_heads": COUNT,
    "model.mamba_head_dim": COUNT,
    "model.mamba_num_groups": COUNT,
    "model.mamba_state_dim": COUNT,
    "model.mamba_conv_kernel": COUNT,
    "model.mamba_chunk_size": COUNT,
    "model.vocab_size": COUNT,
    "model.norm_epsilon": POSITIVE,
    "model.max_position_embeddings": COUNT,
    "model.rope_base": POSITIVE,
    "model.attention_logit_scale": POSITIVE,
    "model.attention_logit_cap": POSITIVE,
    "model.layer_scale": POSITIVE,
    "model.init_std": POSITIVE,
    "precision.bf16_first_layers": COUNT_OR_NONE,
    "precision.bf16_last_layers": COUNT_OR_NONE,
    "parallel.tensor_parallel_size": COUNT,
    "parallel.pipeline_parallel_size": COUNT,
    "parallel.virtual_pipeline_size": COUNT,
    "parallel.context_parallel_size": COUNT,
    "parallel.timeout_seconds": COUNT,
    "data.phases[].start_tokens": COUNT_OR_NONE,
    "data.phases[].weights[].weight": Range(0),
    "data.phases[].weights[].fim_rate": Range(0, 1),
    "data.phases[].seq_length": COUNT,
    "data.fim_spm_rate": Range(0, 1),
    "data.max_epochs": POSITIVE,
    "optim.adam_beta1": FRACTION,
    "optim.adam_beta2": FRACTION,
    "optim.adam_epsilon": POSITIVE,
    "optim.weight_decay": Range(0),
    "optim.clip_grad_norm": Range(0),
    "lr.peak": POSITIVE,
    "lr.min": Range(0),
    "lr.warmup_tokens": COUNT_OR_NONE,
    "lr.decay_tokens": COUNT,
    "train.train_tokens": COUNT,
    "train.seq_length": COUNT,
    "train.global_batch_size": COUNT,
    "train.micro_batch_size": COUNT,
    "train.batch_schedule[].start_tokens": COUNT,
    "train.batch_schedule[].global_batch_size": COUNT,
    "train.eval_every_steps": COUNT_OR_NONE,
    "train.eval_tokens": COUNT,
    "train.max_skipped_steps": Range(1, SKIPPED_STEPS_KEPT - 1),
    "checkpoint.every_steps": COUNT_OR_NONE,
    "checkpoint.keep_last": COUNT_OR_NONE,
    "checkpoint.keep_every_tokens": COUNT_OR_NONE,
    "log.every_steps": COUNT,
}


def out_of_range(config: RunConfig) -> Iterator[str]:
    """Yield a problem for every number outside its range."""
    for key, value in _leaves("", plain(config)):
        allowed = RANGES.get(re.sub(r"\[\d+\]", "[]", key))
        if allowed is not None and value is not None and not allowed.holds(value):
            yield f"{key}={value} must be {allowed}."


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{key}[{index}]", inner)
    else:
        yield key, value
