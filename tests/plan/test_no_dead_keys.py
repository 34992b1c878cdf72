"""No key without effect: each one changes the plan, or is read by the code that runs."""

import ast
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.config.keys import describe_keys
from nemotron_train.plan.run_plan import RunPlan, plan_run
from tests.plan.small import config_with

PACKAGE = Path(__file__).parents[2] / "nemotron_train"

# key -> changes that must show in the plan on 4 ranks (several where one alone would be refused)
CHANGES_THE_PLAN = {
    "model.layer_pattern": ["model.layer_pattern=M-M*-M-M**"],
    "model.hidden_size": ["model.hidden_size=192"],
    "model.ffn_hidden_size": ["model.ffn_hidden_size=512"],
    "model.num_attention_heads": ["model.num_attention_heads=8"],
    "model.num_query_groups": ["model.num_query_groups=1"],
    "model.attention_head_dim": ["model.attention_head_dim=32"],
    "model.mamba_num_heads": ["model.mamba_num_heads=8"],
    "model.mamba_head_dim": ["model.mamba_head_dim=16"],
    "model.mamba_num_groups": ["model.mamba_num_groups=1"],
    "model.mamba_state_dim": ["model.mamba_state_dim=16"],
    "model.mamba_conv_kernel": ["model.mamba_conv_kernel=3"],
    "model.mamba_chunk_size": ["model.mamba_chunk_size=32"],
    "model.vocab_size": ["model.vocab_size=4096"],
    "model.tied_embeddings": ["model.tied_embeddings=true"],
    "model.norm": ["model.norm=layer"],
    "model.linear_bias": ["model.linear_bias=true"],
    "model.position_embedding": ["model.position_embedding=learned", "model.max_position_embeddings=512"],
    "model.max_position_embeddings": ["model.max_position_embeddings=1024"],
    "model.qkv_norm": ["model.qkv_norm=qk"],
    "model.output_norm": ["model.output_norm=true"],
    "model.layer_scale": ["model.layer_scale=0.1"],
    "parallel.tensor_parallel_size": ["parallel.tensor_parallel_size=2"],
    "parallel.pipeline_parallel_size": ["parallel.pipeline_parallel_size=2"],
    "parallel.context_parallel_size": ["parallel.context_parallel_size=2"],
    "parallel.virtual_pipeline_size": ["parallel.virtual_pipeline_size=2"],
    "precision.bf16_first_layers": ["precision.bf16_first_layers=1"],
    "precision.bf16_last_layers": ["precision.bf16_last_layers=1"],
    "lr.schedule": ["lr.schedule=cosine", "lr.decay_tokens=null", "lr.decay_shape=null"],
    "lr.peak": ["lr.peak=0.002"],
    "lr.min": ["lr.min=0.0"],
    "lr.warmup_tokens": ["lr.warmup_tokens=0"],
    "lr.decay_tokens": ["lr.decay_tokens=1000000"],
    "lr.decay_shape": ["lr.decay_shape=linear"],
    "train.train_tokens": ["train.train_tokens=2000000"],
    "train.seq_length": ["train.seq_length=128"],
    "train.global_batch_size": ["train.global_batch_size=64"],
    "train.micro_batch_size": ["train.micro_batch_size=1"],
    "train.batch_schedule": ["train.batch_schedule=[{start_tokens: 5000, global_batch_size: 32}]"],
}

# Not arithmetic: what runs reads them, and the tests of the folder named show what they do.
READ_BY_WHAT_RUNS = {
    "run.name": "observe: titles and wandb",
    "run.dir": "trainer: where everything is written",
    "run.seed": "model, data: weights and order",
    "model.norm_epsilon": "engine, model: norms",
    "model.rope_base": "model: angles of queries and keys",
    "model.attention_logit_scale": "engine: attention",
    "model.attention_logit_cap": "engine: attention",
    "model.initialization": "model: initial values",
    "model.init_std": "model: initial values",
    "precision.primary_weights": "engine: what layers hold their weights in; plan: memory and traffic",
    "precision.fp8_scales": "precision: scales of FP8 tensors",
    "optim.gradients": "engine: gradient buffers and their reduction",
    "optim.moments": "engine: state of AdamW",
    "parallel.sequence_parallel": "engine: parallel linears and norms",
    "parallel.overlap_grad_reduce": "engine: wrapping",
    "parallel.overlap_param_gather": "engine: wrapping",
    "parallel.overlap_tensor_comm": "engine: layers and their user buffers; plan: memory outside torch",
    "parallel.timeout_seconds": "engine: process groups",
    "precision.format": "engine: dtypes",
    "data.path": "data: shards",
    "data.tokenizer": "data, evaluation: its size, samples",
    "data.sources": "data: shards",
    "data.phases": "data: blend",
    "data.document_boundary": "data, model: where attention and scan stop",
    "data.eod_token": "data: ends documents",
    "data.fim_spm_rate": "data: which form a rearranged document gets",
    "data.fim_tokens": "data: tokens of fill-in-the-middle",
    "data.max_epochs": "data: blend",
    "optim.adam_beta1": "optim",
    "optim.adam_beta2": "optim",
    "optim.adam_epsilon": "optim",
    "optim.weight_decay": "optim",
    "optim.clip_grad_norm": "optim",
    "train.eval_every_steps": "trainer: evaluation",
    "train.eval_tokens": "evaluation",
    "train.recompute": "engine, model: activations",
    "train.cuda_graphs": "engine: how passes are started",
    "train.deterministic": "platform, engine: which kernels run on a GPU",
    "train.max_skipped_steps": "trainer: non-finite gradients",
    "checkpoint.every_steps": "trainer: saving",
    "checkpoint.resume": "checkpoint: where a run goes on",
    "checkpoint.asynchronous": "checkpoint: who writes",
    "checkpoint.keep_last": "checkpoint: what is deleted",
    "checkpoint.keep_every_tokens": "checkpoint: what is deleted",
    "checkpoint.allow_change": "checkpoint: what may differ on resume",
    "log.every_steps": "observe: writers",
    "log.wandb": "observe: writers",
    "log.wandb_project": "observe: writers",
}


def observable(plan: RunPlan) -> list[Any]:
    """Return everything that follows from a configuration; not the configuration itself."""
    tokens = range(0, 2_600_000, 50_000)
    derived = [getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "config"]
    rates = [plan.learning_rate_at(consumed) for consumed in tokens]
    return [*derived, plan.train_flops, plan.pipeline_costs(), plan.gemms, rates]


@pytest.mark.parametrize("key", CHANGES_THE_PLAN)
def test_a_key_of_the_plan_changes_it(key: str) -> None:
    """Fails if a key is accepted and nothing follows from it."""
    base = ["train.micro_batch_size=4"]
    if key == "parallel.virtual_pipeline_size":
        base.append("parallel.pipeline_parallel_size=2")
    if key == "model.linear_bias":
        base.append("model.layer_pattern='*-*-'")  # Mamba layers have none
    if key == "model.max_position_embeddings":
        base += ["model.position_embedding=learned", "model.max_position_embeddings=512"]
    if key.startswith("precision."):
        base += ["precision.format=fp8_block", "model.mamba_num_heads=16"]  # sizes that FP8 takes
    before = plan_run(config_with(*base), 4)
    after = plan_run(config_with(*base, *CHANGES_THE_PLAN[key]), 4)
    assert observable(after) != observable(before)


def test_every_key_is_accounted_for() -> None:
    """Fails if a key is added without saying what it changes."""
    keys = {info.key for info in describe_keys() if "[]" not in info.key}
    assert keys == set(CHANGES_THE_PLAN) | set(READ_BY_WHAT_RUNS)


@pytest.mark.parametrize("key", READ_BY_WHAT_RUNS)
def test_a_key_outside_the_plan_is_read_by_what_runs(key: str) -> None:
    """Fails if nothing but the checks and the banner reads a key: it would be an option without effect."""
    section, name = key.split(".")
    assert (section, name) in _attributes_read(), f"nothing outside config/ and plan/ reads {key}"


@functools.cache
def _attributes_read() -> set[tuple[str, str]]:
    """Return every `section.name` that code outside config/ and plan/ reads.

    A section may have been put into a variable, or be a parameter, named after it or not; so the name counts for every
    section whose name or class the file mentions.
    """
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("config", "plan"):
            continue
        text = path.read_text(encoding="utf-8")
        names = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
        for key in READ_BY_WHAT_RUNS:
            section, name = key.split(".")
            if name in names and (section in names or f"{section.capitalize()}Section" in text):
                found.add((section, name))
    return found
