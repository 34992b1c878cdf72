"""How weights that come from elsewhere become a run folder that training can start from.

The folder gets a checkpoint of step 0 without optimizer state, the model as a recipe, and the tokenizer where there is
one. Weights are read, one parameter at a time, while they are written.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from nemotron_train.checkpoint.commit import newest_checkpoint
from nemotron_train.checkpoint.weights_only import write_weights_only
from nemotron_train.config.keys import plain
from nemotron_train.config.schema import ModelSection
from nemotron_train.errors import CheckpointError
from nemotron_train.model.names import rule_for
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.model.reference.sizes import ReferenceSizes

RECIPE, TOKENIZER = "model.yaml", "tokenizer.json"


def parameter_shapes(model: ModelSection) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a model, on one rank, in the order of its layers."""
    sizes = {field.name: getattr(model, field.name) for field in fields(ReferenceSizes)}
    sizes["layer_pattern"] = model.layer_pattern.replace("|", "")
    with torch.device("meta"):
        whole = HybridModel(ReferenceSizes(**sizes))
    return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}


def check_no_checkpoint(run_dir: Path) -> None:
    """Raise CheckpointError if the run folder has a checkpoint already."""
    found, _ = newest_checkpoint(run_dir / "checkpoints")
    if found:
        raise CheckpointError(f"{found} is there already. Choose a new run folder as --output.")


def write_new_run(
    run_dir: Path,
    model: ModelSection,
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    made_from: Mapping[str, object],
    tokenizer: Path | None = None,
) -> Path:
    """Write `run_dir/checkpoints/step_000000000`, `model.yaml` and `tokenizer.json`.

    Args:
        dtypes: what every parameter is stored in.
        read: returns the values of one parameter.
        made_from: what the checkpoint says about its origin.

    Returns:
        the checkpoint.

    Raises:
        CheckpointError: it cannot be written.
    """
    shapes = parameter_shapes(model)
    contents = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
    checkpoint = write_weights_only(run_dir / "checkpoints", model, contents, read, made_from)
    try:
        keys = yaml.safe_dump(recipe_keys(model), sort_keys=False, width=200)
        origin = "".join(f"# {key}: {value}\n" for key, value in made_from.items())
        (run_dir / RECIPE).write_text(f"{origin}{keys}", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, run_dir / TOKENIZER)
    except OSError as error:
        raise CheckpointError(f"Cannot write beside {checkpoint}: {error}") from error
    return checkpoint


def stays_float32(name: str) -> bool:
    """Whether a parameter is float32 in every precision of training."""
    return rule_for(name).float32


def recipe_keys(model: ModelSection) -> dict[str, Any]:
    """Return the keys a model recipe states: those without a default, and those that differ from it."""
    values = {field.name: (getattr(model, field.name), field.default) for field in fields(model)}
    return {name: plain(value) for name, (value, default) in values.items() if default is MISSING or value != default}
