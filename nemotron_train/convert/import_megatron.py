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


def import_megatron(folder: Path, model: ModelSection, run_dir: Path, console: Console) -> Path:
    """Write `run_dir/checkpoints/step_000000000` and the model as a recipe.

    Args:
        folder: with `.metadata` and `.distcp` files (`iter_0001000` of a Megatron-LM run).

    Returns:
        the checkpoint.

    Raises:
        CheckpointError: the folder holds no such checkpoint, or one of another model, or the run folder has one.
    """
    weights = StoredWeights(folder, is_committed=False)
    shapes = parameter_shapes(model)
    weights.check_names(set(shapes), "the command line")
    weights.check_shapes(shapes, "the command line")
    check_no_checkpoint(run_dir)

    def read(name: str) -> Tensor:
        return weights.read(name).float() if stays_float32(name) else weights.read(name)

    dtypes = {name: torch.float32 if stays_float32(name) else weights.dtype(name) for name in weights.names}
    checkpoint = write_new_run(run_dir, model, dtypes, read, {"imported_from": str(folder.resolve())})
    console.print(f"Imported {sum(map(weights.num_elements, weights.names)):,} weights to {checkpoint}.")
    return checkpoint
