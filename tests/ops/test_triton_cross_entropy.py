"""Is the Triton cross-entropy the cross-entropy? The oracle is torch's own in float64.

On the CPU the kernels run in Triton's interpreter (tests/conftest.py), in float32; with a GPU they are compiled.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")

from nemotron_train.ops import triton_cross_entropy as module
from nemotron_train.ops.triton_cross_entropy import cross_entropy
from tests.ops.scan_inputs import gradients_of
from tests.ops.test_cross_entropy import logits_and_labels, loss_of_a_part, plain
from tests.ranks import RankPool

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels run instead")


@on_cpu
@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_loss_and_gradient(block: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a block of the vocabulary is left out, a label meets another token, or large logits overflow."""
    monkeypatch.setattr(module, "_FORWARD_BLOCK", block)
    monkeypatch.setattr(module, "_BACKWARD_BLOCK", block)
    logits, labels = logits_and_labels(scale)
    ours = gradients_of(lambda t: cross_entropy(t * 1.0, labels), [logits.float()])
    for a, b in zip(ours, gradients_of(lambda t: plain(t, labels), [logits.float().double()]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@on_cpu
def test_split_vocabulary(ranks: RankPool) -> None:
    """Fails if a label is looked up in another rank's part, or a maximum or a sum is taken of one part only."""
    logits, labels = logits_and_labels(30.0, vocabulary=12)
    loss, gradient = gradients_of(lambda t: plain(t, labels), [logits.float().double()])
    parts = ranks.run(loss_of_a_part, 4, cross_entropy, torch.float32)
    for part, (own_loss, own_gradient) in zip(gradient.chunk(4, dim=-1), parts, strict=True):
        torch.testing.assert_close(own_loss.double(), loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_gradient.double(), part, rtol=1e-4, atol=1e-6)


@on_cpu
def test_its_gradient_can_be_taken_once() -> None:
    """Fails if a second gradient is computed from what the first one has overwritten."""
    logits, labels = logits_and_labels(1.0)
    loss = cross_entropy(logits.float().requires_grad_() * 1.0, labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("vocabulary", [131072, 1000])
def test_bfloat16_logits_on_a_gpu(vocabulary: int) -> None:
    """Fails if the compiled kernels differ from the definition by more than the gradient's rounding to bfloat16."""
    logits, labels = logits_and_labels(3.0, vocabulary)
    logits, labels = logits.to("cuda", torch.bfloat16), labels.cuda()
    loss, gradient = gradients_of(lambda t: cross_entropy(t * 1.0, labels), [logits])
    right_loss, right_gradient = gradients_of(lambda t: plain(t, labels), [logits.double()])
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=2**-8, atol=1e-9)
