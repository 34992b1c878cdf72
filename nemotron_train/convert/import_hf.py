"""`import-hf`: a folder that transformers can open -> a checkpoint of step 0 in a new run folder.

All names and shapes are compared before anything is written. The weights are exactly those of the files, in the
precision of the files; one parameter at a time is in memory. The optimizer of a run that starts from them begins anew.
"""

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import NemotronHConfig

from nemotron_train.config.schema import ModelSection
from nemotron_train.convert.hf_config import NO_FLOOR, model_section, names_of
from nemotron_train.convert.new_run import (
    RECIPE,
    TOKENIZER,
    check_no_checkpoint,
    parameter_shapes,
    stays_float32,
    write_new_run,
)
from nemotron_train.convert.safetensor_files import TensorFiles
from nemotron_train.errors import CheckpointError, ConfigError

_HEAD, _EMBEDDING = "lm_head.weight", "model.embeddings.weight"


def import_hugging_face(folder: Path, run_dir: Path, console: Console) -> Path:
    """Write `run_dir/checkpoints/step_000000000`, the model as a recipe, and the tokenizer.

    Returns:
        the checkpoint.

    Raises:
        ConfigError: the folder is no NemotronH that our model can be.
        CheckpointError: tensors are missing, left over or of other shapes, or the run folder has a checkpoint.
    """
    config = read_config(folder)
    model = model_section(config)
    weights = ImportedWeights(folder, model)
    check_no_checkpoint(run_dir)
    tokenizer = folder / TOKENIZER
    checkpoint = write_new_run(
        run_dir,
        model,
        weights.dtypes(),
        weights.read,
        {"imported_from": str(folder.resolve())},
        tokenizer if tokenizer.is_file() else None,
    )
    if config.time_step_min > NO_FLOOR:
        console.print(
            f"Note: transformers keeps this model's dt above time_step_min={config.time_step_min}; Megatron-Core and "
            "training here do not. Its logits there can differ from those here."
        )
    console.print(f"Imported {weights.num_elements:,} weights to {checkpoint}.")
    console.print(f"Train from it with run.dir={run_dir} and {run_dir / RECIPE} as recipes/model/NAME.yaml.")
    return checkpoint


def read_config(folder: Path) -> NemotronHConfig:
    """Let transformers read `config.json`, older spellings included.

    Raises:
        ConfigError: there is none, it cannot be read, or it is another architecture's.
    """
    path = folder / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        model_type = said.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}. --input is a folder with a model in it.") from error
    if model_type != NemotronHConfig.model_type:
        raise ConfigError(
            f"{path} says model_type={model_type!r}; only {NemotronHConfig.model_type!r} can be imported. "
            "Choose a model of the family Nemotron-H or Nemotron Nano 2."
        )
    try:
        return NemotronHConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers validates with error classes of several libraries
        raise ConfigError(f"Cannot read {path} as that of a NemotronH: {error}") from error


class ImportedWeights:
    """The tensors of a Hugging Face folder under our names; nothing is read before it is asked for."""

    def __init__(self, folder: Path, model: ModelSection) -> None:
        """Compare names and shapes with the model, from the files' headers alone.

        Raises:
            CheckpointError: files are missing or damaged, names or shapes do not fit, or a tied model's head is another
                matrix.
        """
        self._files, names = TensorFiles(folder), names_of(model)
        self._names, self._renamed, self._split = names, names.renamed(), names.split()
        self._shapes = parameter_shapes(model)
        self._check(folder, model)

    @property
    def num_elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes.values())

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return what each parameter is stored in; those that are float32 in every precision are widened."""
        return {
            name: torch.float32 if stays_float32(name) else self._files.header(self._sources(name)[0]).dtype
            for name in self._shapes
        }

    def read(self, name: str) -> Tensor:
        tensors = [self._files.read(source) for source in self._sources(name)]
        if name in self._split:
            return self._names.join_qkv(*tensors)
        return tensors[0].float() if stays_float32(name) else tensors[0]

    def _sources(self, name: str) -> list[str]:
        return self._split[name] if name in self._split else [self._renamed[name]]

    def _check(self, folder: Path, model: ModelSection) -> None:
        with torch.device("meta"):
            theirs = self._names.to_hugging_face({name: torch.empty(shape) for name, shape in self._shapes.items()})
        repeated = {_HEAD} if model.tied_embeddings else set()
        self._files.check({name: tuple(tensor.shape) for name, tensor in theirs.items()}, optional=repeated)
        if repeated & set(self._files.names) and not torch.equal(self._files.read(_HEAD), self._files.read(_EMBEDDING)):
            raise CheckpointError(
                f"{folder} says tie_word_embeddings=true, but lm_head.weight is another matrix than the embedding. "
                "Set it to false in config.json to keep both."
            )
