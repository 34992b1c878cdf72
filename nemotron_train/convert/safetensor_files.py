"""Writes and reads a model as Hugging Face stores it: `model-0000i-of-0000n.safetensors` and their index.

Files carry the names of the released models, which begin with `backbone.`; transformers renames that to `model.`
while loading, and the rest of the package uses its name in memory. Both are read.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_train.errors import CheckpointError

INDEX = "model.safetensors.index.json"


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


def write_files(folder: Path, contents: Iterable[Mapping[str, Tensor]], count: int, *, total_bytes: int) -> None:
    """Write `count` files, taking the contents of one after the other, and their index.

    Raises:
        CheckpointError: a file cannot be written.
    """
    index: dict[str, str] = {}
    for number, tensors in enumerate(contents, start=1):
        path = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        renamed = {_in_file(name): tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(renamed, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Cannot write {path}: {error}. Check the free space.") from error
        index.update(dict.fromkeys(renamed, path.name))
    described = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(index.items()))}
    (folder / INDEX).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for name in set(index.values()):
        shutil.copymode(folder / INDEX, folder / name)  # safetensors makes them readable by their owner only


class TensorFiles:
    """The tensors of a folder under their names in memory."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if there are no weights, or a file is missing or damaged."""
        self._places: dict[str, tuple[Path, str]] = {}
        for path in _files_of(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    self._places.update({_in_memory(name): (path, name) for name in file.keys()})  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"Cannot read {path}: {error}") from error

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def read(self, name: str) -> Tensor:
        path, name_in_file = self._places[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name_in_file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Cannot read {name_in_file} from {path}: {error}") from error


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
