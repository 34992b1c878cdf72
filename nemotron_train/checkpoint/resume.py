"""Which checkpoint a run starts from, and whether it may."""

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from nemotron_train.checkpoint.commit import Commit, newest_checkpoint, read_commit
from nemotron_train.config.schema import ModelSection, RunConfig
from nemotron_train.data.blend import BlendPlan
from nemotron_train.errors import CheckpointError, ConfigError
from nemotron_train.plan.batching import BatchPlan

logger = logging.getLogger(__name__)

# Keys of the model that change its speed or its first weights, not its shape or function.
_FREE_MODEL_KEYS = {"mamba_chunk_size", "initialization", "init_std"}


def checkpoints_folder(config: RunConfig) -> Path:
    return Path(config.run.dir) / "checkpoints"


def choose_checkpoint(config: RunConfig) -> Path | None:
    """Follow `checkpoint.resume`.

    Returns:
        the folder to load, or None for a new run. A named folder is where a new run starts; started again, the run goes
        on from its own newest checkpoint.

    Raises:
        ConfigError: the run folder holds a checkpoint that must not be there: any with `never`, one newer than the
        named one.
        CheckpointError: the named folder is no complete checkpoint, or the run folder has checkpoints and none is
        complete.
    """
    resume, own = config.checkpoint.resume, checkpoints_folder(config)
    newest, passed_over = newest_checkpoint(own)
    for reason in passed_over:
        logger.warning("Passed over a checkpoint: %s", reason)
    if newest is None and passed_over:
        raise CheckpointError(
            f"No checkpoint in {own} is complete. Move them away to start anew: {'; '.join(passed_over)}"
        )
    if resume == "auto" or (resume == "never" and newest is None):
        return newest
    if resume == "never":
        raise ConfigError(
            f"checkpoint.resume=never, but {newest} is there. Choose another run.dir, or checkpoint.resume=auto to go "
            "on."
        )
    return _named_or_own(Path(resume), newest)


def _named_or_own(named: Path, newest: Path | None) -> Path:
    read_commit(named)
    if newest is None or named.resolve() == newest.resolve():
        return named
    if named.resolve().parent == newest.resolve().parent:
        raise ConfigError(
            f"checkpoint.resume={named}, but {newest} is newer and would be overwritten. Choose another run.dir to "
            "branch "
            "off, or move the newer ones away."
        )
    origin = read_commit(newest).origin
    if origin != str(named.resolve()):
        raise ConfigError(
            f"checkpoint.resume={named}, but {newest.parent} holds a run that started from {origin or 'nothing'}. "
            "Choose another run.dir, or checkpoint.resume=auto to go on with that run."
        )
    logger.info("This run started from %s and has checkpoints of its own by now.", named)
    return newest


def origin_of(folder: Path, commit: Commit, config: RunConfig) -> str | None:
    """Where a run that loads `folder` started from: that folder, unless it is one of the run's own."""
    return commit.origin if folder.resolve().parent == checkpoints_folder(config).resolve() else str(folder.resolve())


def check_may_resume(commit: Commit, config: RunConfig, blend: BlendPlan) -> None:
    """Refuse to go on with another model, or with another past of the data stream.

    Raises:
        CheckpointError: says what differs, both values.
    """
    asked = model_facts(config.model)
    different = [
        f"model.{key}: {commit.model.get(key)!r} then, {value!r} now"
        for key, value in asked.items()
        if commit.model.get(key) != value
    ]
    if different:
        raise CheckpointError(f"The checkpoint of step {commit.step} is of another model ({'; '.join(different)}).")
    now = blend.past_hash(commit.consumed_tokens)
    if commit.consumed_tokens and now != commit.data_hash:  # imported weights have no past
        different = list(_differences(commit.data_past, blend.past(commit.consumed_tokens))) if commit.data_past else []
        raise CheckpointError(
            f"The first {commit.consumed_tokens} tokens would be others now than those the checkpoint of step "
            f"{commit.step} was trained on "
            f"(plan hash {commit.data_hash[:12]} then, {now[:12]} now): run.seed, train.seq_length, the sources' "
            "shards, or a phase that has already begun was changed. Restore them; train_tokens and phases that have "
            "not begun may change." + "".join(f"\n  {line}" for line in different)
        )


def _differences(then: object, now: object, key: str = "") -> Iterator[str]:
    """Yield what differs in two values of JSON, by its place in them."""
    if isinstance(then, list) and isinstance(now, list):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    if isinstance(then, dict) and isinstance(now, dict):
        for name in [*then, *(name for name in now if name not in then)]:
            yield from _differences(then.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif then != now:
        yield f"{key}: {then} then, {now} now"


def check_lengths_change_between_steps(batches: BatchPlan, consumed_tokens: int) -> None:
    """Refuse to go on where a step would reach over a change of sample length, as it may after a change of batch size.

    Raises:
        ConfigError: names the change and the steps around it.
    """
    for before, after in pairwise(batches.segments):
        start = after.start_tokens
        if before.seq_length == after.seq_length or start <= consumed_tokens:
            continue
        step = batches.step_at_or_after(start, consumed_tokens)
        if step != start:
            raise ConfigError(
                f"Samples change from {before.seq_length} to {after.seq_length} tokens at {start} tokens, within a "
                f"step: after the checkpoint's {consumed_tokens} tokens, steps start at "
                f"{step - before.tokens_per_step} and {step}. Change data.phases[].start_tokens to one of them, or the "
                "global batch size."
            )


def model_facts(model: ModelSection) -> dict[str, object]:
    """The keys of a model that its weights depend on, as plain values. Pipeline cuts in the pattern are not among
    them."""
    facts = {key: value for key, value in vars(model).items() if key not in _FREE_MODEL_KEYS}
    facts["layer_pattern"] = model.layer_pattern.replace("|", "")
    return facts
