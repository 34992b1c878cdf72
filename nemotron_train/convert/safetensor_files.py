"""Writes and reads a model as Hugging Face stores it: `model-0000i-of-0000n.safetensors` and their index.

Files carry the names of the released models, which begin with `backbone.`; transformers renames that to `model.`
while loading, and the rest of the package uses its name in memory. Both are read.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_train.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def plan_files(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Spread things over files in order, no file above `max_bytes` unless a single thing is."""
    files: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not files or filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def write_files(folder: Path, contents: Sequence[Callable[[], Mapping[str, Tensor]]], *, total_bytes: int) -> None:
    """Write a file for each of `contents`, which is asked for its tensors only then, and their index.

    Raises:
        CheckpointError: a file cannot be written.
    """
    index: dict[str, str] = {}
    for number, tensors in enumerate(contents, start=1):
        path = folder / f"model-{number:05d}-of-{len(contents):05d}.safetensors"
        index.update(dict.fromkeys(_write_file(path, tensors), path.name))
    described = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(index.items()))}
    (folder / INDEX).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for name in set(index.values()):
        shutil.copymode(folder / INDEX, folder / name)  # safetensors makes them readable by their owner only


def _write_file(path: Path, contents: Callable[[], Mapping[str, Tensor]]) -> list[str]:
    """Write one file, whose tensors are let go before the next one's are asked for; returns their names."""
    tensors = {_in_file(name): tensor.contiguous() for name, tensor in contents().items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write {path}: {error}. Check the free space.") from error
    return list(tensors)


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor."""

    path: Path
    name_in_file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles:
    """The tensors of a folder under their names in memory."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            CheckpointError: there are no weights, or a file is missing, damaged or of numbers that are not known.
        """
        self._folder = folder
        self._places: dict[str, StoredTensor] = {}
        for path in _files_of(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        header = file.get_slice(name)
                        shape, dtype = tuple(header.get_shape()), _DTYPES[header.get_dtype()]
                        self._places[_in_memory(name)] = StoredTensor(path, name, shape, dtype)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"Cannot read {path}: {error}. Copy it again.") from error
            except KeyError as error:
                raise CheckpointError(
                    f"{name} in {path} is stored as {error}, only {', '.join(_DTYPES)} are known."
                ) from error

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def header(self, name: str) -> StoredTensor:
        return self._places[name]

    def check(self, shapes: Mapping[str, tuple[int, ...]], optional: Set[str] = frozenset()) -> None:
        """Compare the headers with what a model has.

        Args:
            shapes: of all its tensors, by their names in memory.
            optional: names that may be there besides.

        Raises:
            CheckpointError: names what is missing, left over or of another shape.
        """
        given = self._places.keys()
        missing, left_over = sorted(shapes.keys() - given), sorted(given - shapes.keys() - optional)
        if missing or left_over:
            raise CheckpointError(
                f"The tensors in {self._folder} are not those of the model in its config.json: missing are "
                f"{missing[:3]} ({len(missing)} in all), without a place there are {left_over[:3]} ({len(left_over)} "
                "in all). Check hybrid_override_pattern and tie_word_embeddings."
            )
        for name, shape in shapes.items():
            found = self._places[name]
            if found.shape != shape:
                raise CheckpointError(
                    f"{found.name_in_file} in {found.path} has the shape {found.shape}; a model of the sizes in "
                    f"config.json has {shape}. Use the config.json that belongs to these files."
                )

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        try:
            with safe_open(place.path, framework="pt") as file:
                return file.get_tensor(place.name_in_file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Cannot read {place.name_in_file} from {place.path}: {error}") from error


def _files_of(folder: Path) -> list[Path]:
    """The files that the index names; without an index, all there are."""
    if not (folder / INDEX).is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"{folder} holds no weights: neither {INDEX} nor another .safetensors file.")
        return found
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"Cannot read {folder / INDEX}: {error}") from error


def _in_file(name: str) -> str:
    return f"backbone.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _in_memory(name: str) -> str:
    return f"model.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name
