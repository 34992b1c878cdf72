"""`import-megatron`: a `torch_dist` checkpoint of Megatron-Core's hybrid model -> a checkpoint of step 0 in a new run
folder.

The parameters of both have the same names and are split in the same parts, so nothing is rearranged; the recipe says
which model it is, because Megatron-Core's files do not. One parameter at a time is in memory. The optimizer of a run
that starts from them begins anew.
"""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from nemotron_train.checkpoint.stored_weights import StoredWeights
from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.new_run import check_no_checkpoint, parameter_shapes, stays_float32, write_new_run
from nemotron_train.errors import CheckpointError


def import_megatron(folder: Path, model: ModelSection, run_dir: Path, console: Console) -> Path:
    """Write `run_dir/checkpoints/step_000000000` and the model as a recipe.

    Args:
        folder: with `.metadata` and `.distcp` files (`iter_0001000` of a Megatron-LM run).

    Returns:
        the checkpoint.

    Raises:
        CheckpointError: the folder holds no such checkpoint, or one of another model, or the run folder has one.
    """
    weights = StoredWeights(folder, committed=False)
    check_shapes(weights, model)
    check_no_checkpoint(run_dir)

    def read(name: str) -> Tensor:
        return weights.read(name).float() if stays_float32(name) else weights.read(name)

    dtypes = {name: torch.float32 if stays_float32(name) else weights.dtype(name) for name in weights.names}
    checkpoint = write_new_run(run_dir, model, dtypes, read, {"imported_from": str(folder.resolve())})
    console.print(f"Imported {sum(map(weights.num_elements, weights.names)):,} weights to {checkpoint}.")
    return checkpoint


def check_shapes(weights: StoredWeights, model: ModelSection) -> None:
    """Raise CheckpointError unless the stored parameters are just those of the model, in name and shape."""
    expected, found = parameter_shapes(model), {name: weights.shape(name) for name in weights.names}
    lacking, left_over = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if lacking or left_over:
        raise CheckpointError(
            f"{weights.folder} holds another model than model.layer_pattern={model.layer_pattern!r}: it lacks "
            f"{lacking[:3]} ({len(lacking)} in all) and has {left_over[:3]} ({len(left_over)} in all) besides."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{weights.folder}: {name} has the shape {found[name]}, and {shape} by the recipe. Change model=NAME "
                "or the keys of model that this follows from."
            )
