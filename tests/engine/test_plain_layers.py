"""Does plain attention keep to its document? The oracle is softmax under a mask of whole samples, in float64."""

import pytest
import torch
from torch import Tensor

from nemotron_train.engine.plain_layers import CausalAttention
from nemotron_train.ops.documents import Documents
from tests.ops.scan_inputs import gradients_of

# Two samples of 9 tokens with other documents each: of one token, at both ends, and a sample that is one document.
DOCUMENTS = ([[0, 1, 1, 1, 1, 2, 3, 3, 4], [0, 0, 0, 1, 1, 1, 1, 1, 1]], [[0] * 9, [0, 0, 0, 0, 0, 0, 0, 0, 1]])


def random_heads() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(9, 2, heads, 5, generator=random, dtype=torch.float64) for heads in (4, 2, 2)]


def masked_attention(number_BS: Tensor, q_SBHP: Tensor, k_SBGP: Tensor, v_SBGP: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, dim=2) for t in (k_SBGP, v_SBGP))
    scores_BHST = torch.einsum("sbhp,tbhp->bhst", q_SBHP, k) / 5**0.5
    seen_BST = (number_BS[:, :, None] == number_BS[:, None, :]).tril()
    weights = scores_BHST.masked_fill(~seen_BST[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhst,tbhp->sbhp", weights, v).flatten(2)


@pytest.mark.parametrize("numbers", DOCUMENTS)
def test_attention_of_documents_equals_masked_attention(numbers: list[list[int]]) -> None:
    """Fails if a token sees another document, a later token, another sample, or too little of its own."""
    number_BS = torch.tensor(numbers, dtype=torch.int32)
    attention = CausalAttention(None)
    found = gradients_of(lambda *t: attention(*t, packed_seq_params=Documents(number_BS)), random_heads())
    expected = gradients_of(lambda *t: masked_attention(number_BS, *t), random_heads())
    for ours, masked in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-12, atol=1e-12)
