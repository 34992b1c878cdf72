"""Do the two definitions of the state-space scan agree?"""

import pytest
import torch

from nemotron_train.model.reference.ssd import ssd_chunked, ssd_recurrence
from tests.ops.scan_inputs import gradients_of, random_scan_inputs


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 64])
def test_chunked_form_equals_the_recurrence(chunk_size: int) -> None:
    """Fails if a block of the chunked form is wrong, or the tail of a length that is no multiple of the chunk."""
    inputs = random_scan_inputs(seq_length=13, groups=2, dtype=torch.float64)
    chunked = gradients_of(lambda *t: ssd_chunked(*t, chunk_size=chunk_size), inputs)
    for ours, expected in zip(chunked, gradients_of(ssd_recurrence, inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_state_of_bfloat16_inputs_is_float32() -> None:
    """Fails if the state is rounded to bfloat16: after 400 tokens the sum of ones would stand still at 256."""
    ones = torch.ones(1, 400, 1, 1, dtype=torch.bfloat16)
    y = ssd_recurrence(ones, ones[..., 0], -torch.zeros(1), ones, ones, torch.zeros(1))
    assert y[0, -1].item() == 400
