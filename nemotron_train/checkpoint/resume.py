"""Which checkpoint a run starts from, and whether it may."""

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from nemotron_train.checkpoint.commit import (
    COMMIT_FILE,
    Commit,
    DamagedCheckpoint,
    list_checkpoints,
    newest_checkpoint,
    quarantine,
    quarantined,
    read_commit,
)
from nemotron_train.checkpoint.resume_gate import changes_on_resume, check_configuration
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.blend import BlendPlan
from nemotron_train.errors import CheckpointError, ConfigError
from nemotron_train.plan.batching import BatchPlan
from nemotron_train.runtime import Progress

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # the folder in a run's that holds them
NAME_ONE = "Name a checkpoint, such as RUN_DIR/checkpoints/step_000000100, or auto."


def checkpoints_folder(config: RunConfig) -> Path:
    return Path(config.run.dir) / CHECKPOINTS


def check_named_folder(config: RunConfig) -> None:
    """Refuse a folder in `checkpoint.resume` that cannot be a checkpoint, before anything is started for it.

    Raises:
        ConfigError: it does not exist, holds checkpoints instead of being one, or has no `COMMIT.json`.
    """
    if config.checkpoint.resume in ("auto", "never"):
        return
    named = Path(config.checkpoint.resume)
    try:
        named.stat()
    except OSError as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ConfigError(f"checkpoint.resume={named} {problem}. {NAME_ONE}") from error
    in_run = named / CHECKPOINTS
    if in_run.is_dir():
        kind, checkpoints = "run folder", in_run
    elif list_checkpoints(named) or named.name == CHECKPOINTS:
        kind, checkpoints = "folder of checkpoints", named
    elif (named / COMMIT_FILE).is_file():
        return
    else:
        raise ConfigError(
            f"checkpoint.resume={named} is not a complete checkpoint: it has no {COMMIT_FILE}. {NAME_ONE}"
        )
    newest, _ = newest_checkpoint(checkpoints)
    if newest is None:
        raise ConfigError(f"checkpoint.resume={named} is a {kind} without a complete checkpoint. Name another one.")
    raise ConfigError(
        f"checkpoint.resume={named} is a {kind}; its newest checkpoint is {newest}. Name that one, or an older one."
    )


def choose_checkpoint(config: RunConfig) -> Path | None:
    """Follow `checkpoint.resume`. Folders of the run that are no complete checkpoints are moved aside.

    Returns:
        the folder to load, or None for a new run. A named folder is where a new run starts; started again, the run goes
        on from its own newest checkpoint.

    Raises:
        ConfigError: the run folder holds a checkpoint that must not be there: any with `never`, one newer than the
        named one.
        CheckpointError: the named folder is no complete checkpoint, or the run folder has had checkpoints and none is
        good.
    """
    resume, own = config.checkpoint.resume, checkpoints_folder(config)
    newest = _newest_good(own)
    if newest is None and (damaged := quarantined(own)):
        raise CheckpointError(
            f"No checkpoint in {own} is good. Move what is in it away to start anew.\n" + "\n".join(damaged)
        )
    if resume == "auto" or (resume == "never" and newest is None):
        return newest
    if resume == "never":
        raise ConfigError(
            f"checkpoint.resume=never, but {newest} is there. Choose another run.dir, or checkpoint.resume=auto to go "
            "on."
        )
    return _named_or_own(Path(resume), newest)


def _newest_good(checkpoints: Path) -> Path | None:
    for folder in list_checkpoints(checkpoints):
        try:
            read_commit(folder)
        except DamagedCheckpoint as damage:
            move_aside(folder, damage)
        else:
            return folder
    return None


def move_aside(folder: Path, damage: DamagedCheckpoint) -> None:
    """Take a damaged checkpoint out of the way, so that the next older one is the newest."""
    aside = quarantine(folder, str(damage))
    logger.error("Damaged checkpoint, moved to %s: %s", aside, damage)


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


def is_own(folder: Path, config: RunConfig) -> bool:
    """Whether a checkpoint is one of the run's own, and not where a new run starts."""
    return folder.resolve().parent == checkpoints_folder(config).resolve()


def check_may_resume(commit: Commit, config: RunConfig, blend: BlendPlan, *, is_new_run: bool) -> None:
    """Refuse to go on with another configuration, or with another past of the data stream.

    Raises:
        CheckpointError: says what differs, both values.
    """
    check_configuration(commit, config, is_new_run=is_new_run)
    now = blend.past_hash(commit.consumed_tokens)
    if not commit.consumed_tokens or now == commit.data_hash:  # imported weights have no past
        return
    if is_new_run:
        logger.warning(
            "The %s tokens before this checkpoint are not those that this run's data begins with: its own data is read "
            "from there on.",
            f"{commit.consumed_tokens:,}",
        )
        return
    different = list(_differences(commit.data_past, blend.past(commit.consumed_tokens))) if commit.data_past else []
    raise CheckpointError(
        f"The first {commit.consumed_tokens} tokens would be others now than those the checkpoint of step "
        f"{commit.step} was trained on "
        f"(plan hash {commit.data_hash[:12]} then, {now[:12]} now): the sources' shards, or a phase that has already "
        "begun, were changed. Restore them; phases that have not begun may change."
        + "".join(f"\n  {line}" for line in different)
    )


def progress_of(commit: Commit, folder: Path, config: RunConfig) -> Progress:
    """Return where a run stands that has loaded a checkpoint, and remember what it does differently from here on."""
    is_new_run = not is_own(folder, config)
    changed = changes_on_resume(commit, config, is_new_run=is_new_run)
    for key, (then, now) in changed.items():
        logger.warning("Changed after step %d: %s, %s then, %s now.", commit.step, key, then, now)
    change = {"step": commit.step, "consumed_tokens": commit.consumed_tokens, "changed": changed}
    return Progress(
        step=commit.step,
        consumed_tokens=commit.consumed_tokens,
        skipped_steps=commit.skipped_steps,
        skipped_at=tuple(commit.skipped_at),
        origin=str(folder.resolve()) if is_new_run else commit.origin,
        changes=(*commit.changes, *([change] if changed else [])),
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
