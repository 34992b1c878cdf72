"""`import-mcore`: a checkpoint that Megatron-Core wrote of its hybrid model -> one of step 0 in a new run folder.

Weights alone are taken, one parameter at a time, whatever layout wrote them: both programs keep them under the same
names and packed alike. Which model they are of is said on the command line, because Megatron-LM keeps it in a pickle
that would have to be executed. There are no hashes to compare; names and shapes are, before anything is written.
"""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from nemotron_train.checkpoint.stored_weights import StoredWeights
from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.new_run import check_no_checkpoint, parameter_shapes, stays_float32, write_new_run


def import_megatron_core(folder: Path, model: ModelSection, run_dir: Path, console: Console) -> Path:
    """Write `run_dir/checkpoints/step_000000000` and the model as a recipe.

    Returns:
        the checkpoint.

    Raises:
        CheckpointError: the folder is no `torch_dist` checkpoint or one of another model, or the run folder has a
            checkpoint.
    """
    check_no_checkpoint(run_dir)
    stored, shapes = StoredWeights(folder, is_committed=False), parameter_shapes(model)
    stored.check_names(set(shapes), described_by="the command line")
    stored.check_shapes(shapes, described_by="the command line")
    dtypes = {name: torch.float32 if stays_float32(name) else stored.dtype(name) for name in shapes}

    def read(name: str) -> Tensor:
        return stored.read(name).to(dtypes[name])

    checkpoint = write_new_run(run_dir, model, dtypes, read, {"imported_from": str(folder.resolve())})
    console.print(f"Imported {sum(map(stored.num_elements, shapes)):,} weights to {checkpoint}.")
    return checkpoint
