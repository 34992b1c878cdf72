"""Is the blocked cross-entropy the cross-entropy? The oracle is torch's own in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.ops import cross_entropy as module
from nemotron_train.ops.cross_entropy import cross_entropy
from tests.ops.scan_inputs import gradients_of


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def logits_and_labels(scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(5, 3, 11, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 11, (3, 5), generator=generator).t()


@pytest.mark.parametrize("block_tokens", [1, 4, 100])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_loss_and_gradient(block_tokens: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a block of tokens is left out, a label meets another token, or large logits overflow."""
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", block_tokens * 11)
    logits, labels = logits_and_labels(scale)
    ours = gradients_of(lambda t: cross_entropy(t, labels), [logits])
    for a, b in zip(ours, gradients_of(lambda t: plain(t, labels), [logits]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_logits_give_a_float32_loss() -> None:
    """Fails if the sum over the vocabulary is taken in bfloat16."""
    logits, labels = logits_and_labels(1.0)
    loss, gradient = gradients_of(lambda t: cross_entropy(t, labels), [logits.bfloat16()])
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), plain(logits.bfloat16().double(), labels), rtol=1e-6, atol=1e-6)


def test_the_logits_are_left_as_they_are() -> None:
    """Fails if the loss works in the memory of its input."""
    logits, labels = logits_and_labels(1.0)
    before = logits.clone()
    gradients_of(lambda t: cross_entropy(t, labels), [logits.requires_grad_()])
    assert torch.equal(logits, before)
