"""`merge`: the weights of two checkpoints of one architecture -> a checkpoint of step 0 in a new run folder.

Each weight becomes (1 - w) first + w second, computed in float32 and stored in the precision of the first. Nemotron
Nano 2 (arXiv 2508.14444) was made so from two stages of alignment, w about 0.5. One parameter of each checkpoint at a
time is in memory.
"""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.checkpoint.resume_gate import model_of
from nemotron_train.checkpoint.stored_weights import StoredWeights
from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.new_run import check_no_checkpoint, write_new_run
from nemotron_train.errors import ConfigError


def merge_checkpoints(first: Path, second: Path, weight: float, run_dir: Path, console: Console) -> Path:
    """Write `run_dir/checkpoints/step_000000000` and the model as a recipe.

    Args:
        weight: share of the second checkpoint, 0 to 1.

    Returns:
        the new checkpoint.

    Raises:
        ConfigError: the weight is out of range, or the checkpoints are of different models.
        CheckpointError: one cannot be read, or the run folder has a checkpoint.
    """
    if not 0.0 <= weight <= 1.0:
        raise ConfigError(f"--weight={weight:g} is the second checkpoint's share: choose one from 0 to 1.")
    model = one_architecture(first, second)
    check_no_checkpoint(run_dir)
    ours, theirs = StoredWeights(first), StoredWeights(second)

    def read(name: str) -> Tensor:
        mixed = torch.lerp(ours.read(name).float(), theirs.read(name).float(), weight)
        return mixed.to(ours.dtype(name))

    made_from = {"merged_from": [str(first.resolve()), str(second.resolve())], "weight_of_second": weight}
    checkpoint = write_new_run(run_dir, model, {name: ours.dtype(name) for name in ours.names}, read, made_from)
    console.print(f"Merged {1 - weight:g} of {first} and {weight:g} of {second} into {checkpoint}.")
    return checkpoint


def one_architecture(first: Path, second: Path) -> ModelSection:
    """Return the model that both checkpoints are of.

    Raises:
        ConfigError: they are of different models; names every key with both values.
    """
    ours, theirs = model_of(read_commit(first)), model_of(read_commit(second))
    different = [
        f"model.{key}: {ours.get(key)!r} and {theirs.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if different:
        raise ConfigError(
            f"{first} and {second} are of different models: {'; '.join(different)}. Choose two of one model."
        )
    return ModelSection(**ours)
