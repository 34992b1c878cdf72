"""Is the blocked, vocabulary-parallel cross-entropy the cross-entropy? The oracle is torch's own in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from nemotron_train.ops import cross_entropy as module
from nemotron_train.ops.cross_entropy import cross_entropy
from tests.ops.scan_inputs import gradients_of
from tests.ranks import RankPool


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def logits_and_labels(scale: float, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(5, 3, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, vocabulary, (3, 5), generator=generator).t()


@pytest.mark.parametrize("block_tokens", [1, 4, 100])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_loss_and_gradient(block_tokens: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a block of tokens is left out, a label meets another token, or large logits overflow."""
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", block_tokens * 11)
    logits, labels = logits_and_labels(scale)
    ours = gradients_of(lambda t: cross_entropy(t * 1.0, labels), [logits])
    for a, b in zip(ours, gradients_of(lambda t: plain(t, labels), [logits]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_logits_give_a_float32_loss() -> None:
    """Fails if the sum over the vocabulary is taken in bfloat16."""
    logits, labels = logits_and_labels(1.0)
    loss, gradient = gradients_of(lambda t: cross_entropy(t, labels), [logits.bfloat16()])
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), plain(logits.bfloat16().double(), labels), rtol=1e-6, atol=1e-6)


def loss_of_a_part(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Take an implementation's loss, and this rank's part of the gradient, with the vocabulary split over the ranks."""
    dist.init_process_group("gloo")
    logits, labels = logits_and_labels(30.0, vocabulary=12)
    own = logits.to(dtype).chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous()
    parts = gradients_of(lambda t: function(t * 1.0, labels, dist.group.WORLD), [own])
    dist.destroy_process_group()
    return parts


@pytest.mark.parametrize("world_size", [2, 4])
def test_split_vocabulary(world_size: int, ranks: RankPool) -> None:
    """Fails if a label is looked up in another rank's part, or a maximum or a sum is taken of one part only."""
    logits, labels = logits_and_labels(30.0, vocabulary=12)
    loss, gradient = gradients_of(lambda t: plain(t, labels), [logits])
    parts = ranks.run(loss_of_a_part, world_size, cross_entropy, torch.float64)
    for part, (own_loss, own_gradient) in zip(gradient.chunk(world_size, dim=-1), parts, strict=True):
        torch.testing.assert_close(own_loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_gradient, part, rtol=1e-12, atol=1e-12)
