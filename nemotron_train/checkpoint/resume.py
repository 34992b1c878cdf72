"""Which checkpoint a run starts from, and whether it may."""

import logging
from pathlib import Path

from nemotron_train.checkpoint.commit import Commit, newest_checkpoint, read_commit
from nemotron_train.config.schema import ModelSection, RunConfig
from nemotron_train.data.blend import BlendPlan
from nemotron_train.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

# Keys of the model that change its speed or its first weights, not its shape or function.
_FREE_MODEL_KEYS = {"mamba_chunk_size", "initialization", "init_std"}


def checkpoints_folder(config: RunConfig) -> Path:
    return Path(config.run.dir) / "checkpoints"


def choose_checkpoint(config: RunConfig) -> Path | None:
    """Follow `checkpoint.resume`: auto, never, or a folder.

    Returns:
        the folder to load, or None for a new run.

    Raises:
        ConfigError: `never`, and the run folder holds a checkpoint already.
        CheckpointError: the named folder is no complete checkpoint, or the run folder has checkpoints and none is
        complete.
    """
    resume, folder = config.checkpoint.resume, checkpoints_folder(config)
    if resume not in ("auto", "never"):
        read_commit(Path(resume))
        return Path(resume)
    newest, passed_over = newest_checkpoint(folder)
    for reason in passed_over:
        logger.warning("Passed over a checkpoint: %s", reason)
    if newest is None and passed_over:
        raise CheckpointError(
            f"No checkpoint in {folder} is complete. Move them away to start anew: {'; '.join(passed_over)}"
        )
    if resume == "never":
        if newest is not None:
            raise ConfigError(
                f"checkpoint.resume=never, but {newest} is there. Choose another run.dir, or checkpoint.resume=auto to "
                "go on from it."
            )
        return None
    return newest


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
        raise CheckpointError(
            f"The first {commit.consumed_tokens} tokens would be others now than those the checkpoint of step "
            f"{commit.step} was trained on "
            f"(plan hash {commit.data_hash[:12]} then, {now[:12]} now): run.seed, train.seq_length, the sources' "
            "shards, or a phase that has already begun "
            "was changed. Restore them; train_tokens and phases that have not begun may change."
        )


def model_facts(model: ModelSection) -> dict[str, object]:
    """The keys of a model that its weights depend on, as plain values. Pipeline cuts in the pattern are not among
    them."""
    facts = {key: value for key, value in vars(model).items() if key not in _FREE_MODEL_KEYS}
    facts["layer_pattern"] = model.layer_pattern.replace("|", "")
    return facts
