"""Is the fast scan the scan? Its oracle is the recurrence, token by token in float64."""

import pytest
import torch

from nemotron_train.model.reference.ssd import ssd_recurrence
from nemotron_train.ops.ssd import ssd
from tests.ops.scan_inputs import gradients_of, random_scan_inputs

NAMES = ("y", "dx", "ddt", "dA", "dB", "dC", "dD")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("seq_length", [1, 7, 8, 9, 24, 29])
@pytest.mark.parametrize("chunk_size", [1, 8, 16])
def test_output_and_gradients_equal_the_recurrence(groups: int, seq_length: int, chunk_size: int) -> None:
    """Fails if any term of the hand-written backward is wrong, or a chunk's border, or the tail of a length."""
    inputs = random_scan_inputs(seq_length=seq_length, groups=groups, dtype=torch.float64)
    fast = gradients_of(lambda *t: ssd(*t, chunk_size=chunk_size), inputs)
    for name, ours, expected in zip(NAMES, fast, gradients_of(ssd_recurrence, inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("decay", [0.01, 1.0, 30.0])
def test_float32_keeps_four_digits_of_every_gradient(decay: float) -> None:
    """Fails if a gradient is a small difference of large sums, as A's would be with each token's own part left in."""
    inputs = random_scan_inputs(seq_length=200, groups=2, dtype=torch.float32, decay=decay)
    fast = gradients_of(lambda *t: ssd(*t, chunk_size=32), inputs)
    exact = gradients_of(ssd_recurrence, [t.double() for t in inputs])
    for name, ours, expected in zip(NAMES, fast, exact, strict=True):
        assert (ours - expected).norm() <= 3e-5 * expected.norm(), name


def test_bfloat16_inputs_lose_only_the_rounding_of_the_output() -> None:
    """Fails if states, decays or sums are bfloat16: with float32 inside, all is within half a last place (2^-8)."""
    inputs = random_scan_inputs(seq_length=100, groups=2, dtype=torch.bfloat16, decay=0.05)
    fast = gradients_of(lambda *t: ssd(*t, chunk_size=16), inputs)
    exact = gradients_of(ssd_recurrence, [t.float() for t in inputs])
    assert fast[0].dtype == torch.bfloat16
    for name, ours, expected in zip(NAMES, fast, exact, strict=True):
        assert (ours.float() - expected).norm() <= 2**-8 * expected.norm(), name


@pytest.mark.parametrize("decay", [50.0, 1e4, 1e30])
def test_strong_decay_gives_finite_output_and_gradients(decay: float) -> None:
    """Fails if a decay that under- or overflows is multiplied before it is masked (inf * 0), forward or backward."""
    inputs = random_scan_inputs(seq_length=40, groups=2, dtype=torch.float32, decay=decay)
    x, dt, _, B, C, D = inputs
    y, *gradients = gradients_of(lambda *t: ssd(*t, chunk_size=16), inputs)
    assert all(g.isfinite().all() for g in gradients)
    own = (
        torch.einsum("bsgn,bsgn->bsg", B, C).repeat_interleave(2, dim=2) * dt + D
    )  # all that is left: the token itself
    if decay > 1e3:
        torch.testing.assert_close(y, own[..., None] * x)


def test_tokens_with_step_zero_change_nothing() -> None:
    """Fails if dt = 0 (what padding is made of) writes to the state, decays it, or breaks its own gradient."""
    inputs = random_scan_inputs(seq_length=20, groups=2, dtype=torch.float64)
    inputs[1][:, 5:9] = 0
    fast = gradients_of(lambda *t: ssd(*t, chunk_size=8), inputs)
    for ours, expected in zip(fast, gradients_of(ssd_recurrence, inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_order_in_memory_does_not_matter() -> None:
    """Fails if a view of (sequence, micro-batch) memory, or of a wider tensor's columns, is read in the wrong order."""
    inputs = random_scan_inputs(seq_length=24, groups=2, dtype=torch.float64)
    expected = ssd(*inputs, chunk_size=8)
    strided = list(inputs)
    for i in (0, 1, 3, 4):
        wide = torch.cat([inputs[i], torch.full_like(inputs[i], torch.nan)], dim=-1)
        strided[i] = wide.transpose(0, 1).contiguous().transpose(0, 1)[..., : inputs[i].shape[-1]]
    assert torch.equal(ssd(*strided, chunk_size=8), expected)


def test_two_runs_give_the_same_bits() -> None:
    """Fails if a sum depends on anything but its inputs: a resumed run would drift from an uninterrupted one."""
    inputs = random_scan_inputs(seq_length=70, groups=2, heads=8, dtype=torch.float32)
    first, second = (gradients_of(lambda *t: ssd(*t, chunk_size=32), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
