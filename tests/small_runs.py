"""Small real training runs for tests: a hybrid of all three layer kinds, random text with structure, the real
trainer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.shard_writer import write_shard
from nemotron_train.config.schema import (
    CheckpointSection,
    DataSection,
    DecayShape,
    LrSchedule,
    LrSection,
    ModelSection,
    ParallelSection,
    PhaseConfig,
    PrecisionFormat,
    PrecisionSection,
    RunConfig,
    RunSection,
    SourceConfig,
    SourceWeight,
    TrainSection,
)
from nemotron_train.data.run_data import open_run_data
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.user_buffers import user_buffers
from nemotron_train.errors import NemotronTrainError
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.determinism import set_determinism
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.platform.signals import StopRequest
from nemotron_train.trainer import Trainer, build_runtime

VOCAB, SEQ, BATCH = 96, 32, 8


def write_corpus(folder: Path) -> Path:
    """Two sources of noisy counting sequences, and a held-out shard of one; the same on every call."""
    rng = np.random.default_rng(7)
    for name, tokens in (("a", 40_000), ("b", 20_000), ("a_heldout", 2_000)):
        documents = []
        for _ in range(tokens // 50):
            steps = rng.integers(1, 4, size=50)
            documents.append((np.cumsum(steps) + rng.integers(0, VOCAB)) % (VOCAB - 1))
        write_shard(folder / name, documents, np.dtype(np.uint16))
    vocab = {str(number): number for number in range(VOCAB)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    return folder


def small_config(corpus: Path, run_dir: Path, *, steps: int = 20, **sections: dict[str, Any]) -> RunConfig:
    """A run of `steps` steps of 8 x 32 tokens. `sections` change fields: model={"layer_pattern": "M-"}."""
    step_tokens = SEQ * BATCH
    config = RunConfig(
        run=RunSection(name="small", dir=str(run_dir), seed=5),
        model=ModelSection(
            layer_pattern="M-M*-M-M",
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            attention_head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            mamba_num_groups=4,
            mamba_state_dim=8,
            mamba_chunk_size=16,
            vocab_size=VOCAB,
        ),
        parallel=ParallelSection(timeout_seconds=60),
        precision=PrecisionSection(format=PrecisionFormat.fp32),
        data=DataSection(
            path=str(corpus),
            sources=[
                SourceConfig(name="a", prefixes=["a"], eval_prefixes=["a_heldout"]),
                SourceConfig(name="b", prefixes=["b"]),
            ],
            phases=[
                PhaseConfig(start_tokens=0, weights=[SourceWeight("a", 0.7), SourceWeight("b", 0.3)]),
                PhaseConfig(start_tokens=10 * step_tokens, weights=[SourceWeight("a", 0.2), SourceWeight("b", 0.8)]),
            ],
        ),
        lr=LrSection(
            schedule=LrSchedule.wsd,
            peak=3e-3,
            min=3e-5,
            warmup_tokens=2 * step_tokens,
            decay_tokens=4 * step_tokens,
            decay_shape=DecayShape.linear,
        ),
        train=TrainSection(
            train_tokens=steps * step_tokens + 37,  # as many whole steps as fit
            seq_length=SEQ,
            global_batch_size=BATCH,
            micro_batch_size=2,
            eval_tokens=1_000,
        ),
        checkpoint=CheckpointSection(),
    )
    for name, changes in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **changes)})
    return config


def train(config: RunConfig, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Train as this process's rank, as `nemotron_train.train` does; returns the records of metrics.jsonl.

    Args:
        stop_after: ask for a stop, as a signal would, when so many steps are taken.
    """
    with trainer_of(config) as trainer:
        trainer.stop_after = stop_after
        trainer.train()
    return read_metrics(Path(config.run.dir)) if launched_rank().rank == 0 else []


def refusal(config: RunConfig) -> str:
    """What training says that refuses to begin; "trained" if it does not. A job that raises would end the pool."""
    with trainer_of(config) as trainer:
        try:
            trainer.train()
        except NemotronTrainError as error:
            return str(error)
    return "trained"


@contextmanager
def trainer_of(config: RunConfig) -> Iterator["_StoppedTrainer"]:
    me = launched_rank()
    plan = plan_run(config, me.world_size)
    data = open_run_data(config)
    set_determinism(config.train.deterministic)
    platform = choose_platform(me)
    held = process_groups(plan.layout, platform, me, timeout_seconds=60, seed=config.run.seed)
    with held as groups, user_buffers(plan):
        run = build_runtime(plan, platform, groups)
        yield _StoppedTrainer(run, data, StopRequest(), is_reporter=me.rank == 0)


class _StoppedTrainer(Trainer):
    stop_after: int | None = None

    def check_skips(self, result: Any, progress: Any) -> None:
        super().check_skips(result, progress)
        if progress.step == self.stop_after:
            self.stop.signal_name = "SIGTERM"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def logged(key: str, records: list[dict[str, Any]]) -> list[Any]:
    """The values of a key in the records that have it: evaluations have no `loss`, steps no `eval_loss`."""
    return [record[key] for record in records if key in record]
