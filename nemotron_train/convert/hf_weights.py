"""What are the weights of a checkpoint at Hugging Face, one parameter at a time; do written files hold just those?"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemotron_train.checkpoint.stored_weights import StoredWeights
from nemotron_train.convert.hf_names import HfNames
from nemotron_train.convert.safetensor_files import TensorFiles, plan_files, write_files
from nemotron_train.errors import CheckpointError

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "lm_head.weight"


class HfWeights:
    """The weights of one checkpoint under Hugging Face's names. Nothing is read before it is asked for."""

    def __init__(self, names: HfNames, checkpoint: Path) -> None:
        """Raises CheckpointError if the checkpoint is not complete, or not of this model."""
        self._names = names
        self._renamed, self._split = names.renamed(), names.split()
        self._order = sorted([*self._renamed, *self._split], key=_place)
        self._stored = StoredWeights(checkpoint)
        self._stored.check_names(set(self._order))

    @property
    def num_elements(self) -> int:
        """How many weights the model has; a tied head is not counted."""
        return sum(map(self._stored.num_elements, self._order))

    @property
    def main_dtype(self) -> torch.dtype:
        return self._stored.dtype(_EMBEDDING)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return what one of our parameters is at Hugging Face: one tensor, or three, or a tied embedding twice."""
        tensor = self._stored.read(name)
        if name in self._split:
            return dict(zip(self._split[name], self._names.split_qkv(tensor), strict=True))
        theirs = {self._renamed[name]: tensor}
        if name == _EMBEDDING and self._names.tied_embeddings:
            # transformers 5 does not tie this class, whatever its configuration says: it wants both.
            theirs[_HEAD] = tensor.clone()
        return theirs

    def write(self, folder: Path, max_bytes: int) -> None:
        """Write all weights and their index; no file is above `max_bytes` unless one parameter is."""
        sizes = {name: self._stored.num_bytes(name) for name in self._order}
        if self._names.tied_embeddings:
            sizes[_EMBEDDING] *= 2
        files = plan_files(sizes, max_bytes)
        write_files(folder, [partial(self._tensors_of_all, names) for names in files], total_bytes=sum(sizes.values()))

    def check(self, folder: Path) -> None:
        """Read the files back and compare every bit with the checkpoint.

        Raises:
            CheckpointError: names what is missing or left over, or the first tensor that differs.
        """
        files = TensorFiles(folder)
        unread = set(files.names)
        for name in self._order:
            for theirs, expected in self.tensors(name).items():
                if theirs not in unread or not _same_bits(files.read(theirs), expected):
                    raise CheckpointError(f"{theirs} in {folder} is not what the checkpoint has as {name}.")
                unread.remove(theirs)
        if unread:
            raise CheckpointError(f"{folder} has tensors that the checkpoint has not: {sorted(unread)[:3]}.")

    def _tensors_of_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {theirs: tensor for name in names for theirs, tensor in self.tensors(name).items()}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))  # equal even if NaN


def _place(name: str) -> tuple[int, int]:
    """Where a parameter comes in the files: embedding, layers in order, what follows them."""
    if name.startswith("decoder.layers."):
        return 1, int(name.split(".")[2])
    return (0, 0) if name == _EMBEDDING else (2, 0)
