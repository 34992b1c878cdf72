"""Does transformers compute from an export what our reference model computes from the checkpoint?

Three checks. Every stored value is compared bit by bit, through the name map (`hf_weights.py`): that finds damaged
files. Names and shapes are compared with those of the model that transformers builds from `config.json`, without memory
for it. Then both programs run on fixed prompts: that finds a wrong name map, configuration or loading.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.utils import logging as transformers_logging

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.checkpoint.whole_weights import read_reference_model
from nemotron_train.convert.safetensor_files import TensorFiles
from nemotron_train.errors import CheckpointError

PROMPT_LENGTHS = (1, 17, 128, 150)  # one token; inside a chunk of the scan (128 by default); one whole; over its end
PROMPT_SEED = 20


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the logits of the two programs are apart, over all prompts and positions."""

    largest_difference: float
    largest_logit: float
    tolerance: float

    @property
    def limit(self) -> float:
        """What the difference may be: for logits below 1 the tolerance is absolute."""
        return self.tolerance * max(1.0, self.largest_logit)

    @property
    def holds(self) -> bool:
        return self.largest_difference <= self.limit  # a NaN is not

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.largest_difference:.2e}, limit {self.limit:.2e} "
            f"(tolerance {self.tolerance:g}, largest logit {self.largest_logit:.3g}, "
            f"prompts of {', '.join(map(str, PROMPT_LENGTHS))} tokens)"
        )


def check_shapes(exported: Path) -> int:
    """Compare the headers of all files with the model that transformers makes of `config.json`, on the meta device.

    Returns:
        how many tensors there are.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    config = NemotronHConfig.from_pretrained(exported, local_files_only=True)
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    TensorFiles(exported).check(shapes)
    return len(shapes)


def compare_logits(checkpoint: Path, exported: Path, tolerance: float) -> Parity:
    """Run both models on the fixed prompts, one after the other, in float32 on the CPU.

    Raises:
        CheckpointError: transformers finds a tensor missing, left over or of another shape.
    """
    vocab_size = int(str(read_commit(checkpoint).model["vocab_size"]))
    theirs = list(_logits_of_transformers(exported, vocab_size))
    ours = list(_logits_of_reference(checkpoint, vocab_size))
    return Parity(
        largest_difference=_largest([our - their for our, their in zip(ours, theirs, strict=True)]),
        largest_logit=_largest(ours),
        tolerance=tolerance,
    )


def prompts(vocab_size: int) -> list[Tensor]:
    """Return the same random tokens on every machine, (1 S) for each length."""
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    return [torch.randint(vocab_size, (1, length), generator=generator) for length in PROMPT_LENGTHS]


@torch.no_grad()
def _logits_of_transformers(exported: Path, vocab_size: int) -> Iterator[Tensor]:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it would warn of is checked below
    model, loading = NemotronHForCausalLM.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    wrong = {what: list(names) for what, names in loading.items() if names}
    if wrong:
        raise CheckpointError(f"transformers cannot load {exported} as it is: {wrong}")
    model.eval()
    for tokens_BS in prompts(vocab_size):
        yield model(tokens_BS, use_cache=False).logits


@torch.no_grad()
def _logits_of_reference(checkpoint: Path, vocab_size: int) -> Iterator[Tensor]:
    model = read_reference_model(checkpoint, torch.float32)
    for tokens_BS in prompts(vocab_size):
        yield model(tokens_BS)


def _largest(tensors: Sequence[Tensor]) -> float:
    """Return the largest absolute value, or NaN if there is one."""
    return torch.stack([tensor.abs().max() for tensor in tensors]).max().item()
