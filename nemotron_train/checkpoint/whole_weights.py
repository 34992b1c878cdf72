"""Reads the whole weights out of a checkpoint, in one process, without process groups and whatever layout wrote it."""

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.checkpoint.stored_weights import StoredWeights
from nemotron_train.model.names import rule_for
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.model.reference.sizes import ReferenceSizes


def read_whole_weights(folder: Path) -> dict[str, Tensor]:
    """Return every parameter by name, packed ones as the mixer holds them on one rank.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or damaged.
    """
    stored = StoredWeights(folder)
    return {name: stored.read(name) for name in stored.names}


def read_reference_model(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> HybridModel:
    """Return the reference model with a checkpoint's weights in `dtype`; those that training keeps in float32 stay so.

    Raises:
        CheckpointError: the folder is no complete checkpoint, damaged, or holds another model than it says.
    """
    facts, stored = read_commit(folder).model, StoredWeights(folder)
    known = [field.name for field in fields(ReferenceSizes) if field.name in facts]  # older ones lack newer keys
    sizes = ReferenceSizes(**{name: facts[name] for name in known})  # type: ignore[arg-type]
    with torch.device("meta"):
        model = HybridModel(sizes)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored.check_names(set(shapes))
    stored.check_shapes(shapes)
    wide = torch.promote_types(dtype, torch.float32)
    weights = {
        name: stored.read(name).to(device=device, dtype=wide if rule_for(name).float32 else dtype) for name in shapes
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()
