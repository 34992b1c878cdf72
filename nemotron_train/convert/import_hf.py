"""`import-hf`: a folder that transformers can open -> a checkpoint of step 0 in a new run folder.

A run is built on one rank as for training, filled with the weights and saved as any other checkpoint, so that training
on any layout can start from it. The optimizer starts anew. The weights are exactly those of the files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import yaml  # type: ignore[import-untyped]
from rich.console import Console
from torch import Tensor
from transformers import NemotronHConfig

from nemotron_train.checkpoint.commit import newest_checkpoint
from nemotron_train.checkpoint.resume import checkpoints_folder
from nemotron_train.checkpoint.store import save_checkpoint
from nemotron_train.config.schema import (
    DataSection,
    LrSchedule,
    LrSection,
    ModelSection,
    PhaseConfig,
    PrecisionFormat,
    PrecisionSection,
    RunConfig,
    RunSection,
    SourceConfig,
    SourceWeight,
    TrainSection,
)
from nemotron_train.convert.hf_config import NO_FLOOR, model_section, names_of, recipe_keys
from nemotron_train.convert.safetensor_files import TensorFiles
from nemotron_train.data.blend import BlendPlan, Phase
from nemotron_train.engine.groups import process_groups
from nemotron_train.engine.optimizer import allocate_state
from nemotron_train.errors import CheckpointError, ConfigError
from nemotron_train.model.names import rule_for
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.runtime import Progress, Runtime
from nemotron_train.trainer import build_runtime

RECIPE = "model.yaml"
_NO_SOURCE = "none"


def import_hugging_face(folder: Path, run_dir: Path, console: Console) -> Path:
    """Write `run_dir/checkpoints/step_000000000` and the model as a recipe.

    Returns:
        the checkpoint.

    Raises:
        ConfigError: the folder is no NemotronH that our model can be, or this is not a single process.
        CheckpointError: tensors are missing, left over or of other shapes, or the run folder has a checkpoint.
    """
    config = read_config(folder)
    model = model_section(config)
    weights = read_weights(folder, model)
    run_config = config_of_import(model, run_dir, precision_of(weights))
    found, _ = newest_checkpoint(checkpoints_folder(run_config))
    if found:
        raise CheckpointError(f"{found} is there already. Import into a new run folder.")
    checkpoint = save_as_step_zero(run_config, weights)
    write_recipe(model, folder, run_dir / RECIPE)
    if config.time_step_min > NO_FLOOR:
        console.print(
            f"Note: transformers keeps this model's dt above time_step_min={config.time_step_min}; Megatron-Core and "
            "training here do not. Its logits there can differ from those here."
        )
    console.print(f"Imported {sum(tensor.numel() for tensor in weights.values()):,} weights to {checkpoint}.")
    console.print(f"Train from it with run.dir={run_dir} and {run_dir / RECIPE} as recipes/model/NAME.yaml.")
    return checkpoint


def save_as_step_zero(config: RunConfig, weights: Mapping[str, Tensor]) -> Path:
    """Build the run on this one rank, fill it and save it."""
    me = launched_rank()
    if me.world_size != 1:
        raise ConfigError(f"import-hf is one process; {me.world_size} were launched. Start it without torchrun.")
    plan, platform = plan_run(config, 1), choose_platform(me)
    with process_groups(plan.layout, platform, me, timeout_seconds=600, seed=config.run.seed) as groups:
        run = build_runtime(plan, platform, groups)
        put_weights(run, weights)
        allocate_state(run.optimizer)
        return save_checkpoint(run, Progress(), hash_of_no_samples(config.run.seed))


def read_config(folder: Path) -> NemotronHConfig:
    """Let transformers read `config.json`, older spellings included."""
    try:
        return NemotronHConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"Cannot read {folder / 'config.json'} as that of a NemotronH: {error}") from error


def read_weights(folder: Path, model: ModelSection) -> dict[str, Tensor]:
    """Return the folder's tensors under our names.

    Raises:
        CheckpointError: files are missing or damaged, the names do not fit, or a tied model's head is another matrix.
    """
    files = TensorFiles(folder)
    theirs = {name: files.read(name) for name in files.names}
    head = theirs.get("lm_head.weight")
    ours = names_of(model).from_hugging_face(theirs)
    if model.tied_embeddings and head is not None and not torch.equal(head, ours["embedding.word_embeddings.weight"]):
        raise CheckpointError(
            f"{folder} says tie_word_embeddings=true, but lm_head.weight is another matrix than the embedding. "
            "Set it to false in config.json to keep both."
        )
    return ours


def precision_of(weights: Mapping[str, Tensor]) -> PrecisionFormat:
    """Return the smallest precision that holds the weights exactly, besides those that are float32 in each."""
    dtypes = {tensor.dtype for name, tensor in weights.items() if not rule_for(name).float32}
    return PrecisionFormat.bf16 if dtypes == {torch.bfloat16} else PrecisionFormat.fp32


def put_weights(run: Runtime, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights into a runtime of one rank, master weights included.

    Raises:
        CheckpointError: a tensor has another shape than the model that config.json describes.
    """
    with torch.no_grad():
        for name, parameter in _parameters(run):
            if parameter.shape != weights[name].shape:
                raise CheckpointError(
                    f"{name} has the shape {tuple(weights[name].shape)} in the files; a model of the sizes in "
                    f"config.json has {tuple(parameter.shape)}."
                )
            parameter.copy_(weights[name])
    run.optimizer.reload_model_params()


def config_of_import(model: ModelSection, run_dir: Path, precision: PrecisionFormat) -> RunConfig:
    """Return a configuration that holds the model; what it says about data and rates is never used."""
    return RunConfig(
        run=RunSection(name="import", dir=str(run_dir)),
        model=model,
        precision=PrecisionSection(format=precision),
        data=DataSection(
            path=_NO_SOURCE,
            sources=[SourceConfig(name=_NO_SOURCE, prefixes=[_NO_SOURCE])],
            phases=[PhaseConfig(start_tokens=0, weights=[SourceWeight(_NO_SOURCE, 1.0)])],
        ),
        lr=LrSection(schedule=LrSchedule.constant, peak=1e-4),
        train=TrainSection(train_tokens=8, seq_length=8, global_batch_size=1, eval_tokens=8),
    )


def hash_of_no_samples(seed: int) -> str:
    """Return the past that any blend has before its first sample."""
    return BlendPlan([Phase(0, 1, {_NO_SOURCE: 1.0})], {_NO_SOURCE: 2}, seed).past_hash(0)


def write_recipe(model: ModelSection, folder: Path, path: Path) -> None:
    keys = yaml.safe_dump(recipe_keys(model), sort_keys=False, width=200)
    path.write_text(f"# The model of {folder.name}, imported from Hugging Face's format.\n{keys}", encoding="utf-8")


def _parameters(run: Runtime) -> Iterable[tuple[str, torch.nn.Parameter]]:
    (chunk,) = run.chunks
    return chunk.module.named_parameters()
