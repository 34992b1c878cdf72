"""Does delayed scaling take the scale that a list of all past maxima gives, and survive being written down?"""

import pickle
import sys
import types
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nemotron_train.precision.delayed_scaling import AmaxHistory, DelayedScales, advance_together
from nemotron_train.precision.fp8_reference import Fp8Format
from nemotron_train.precision.recipe import DELAYED_HISTORY_STEPS
from tests.precision.states import same


def use(history: AmaxHistory, *maxima: float) -> list[float]:
    """Quantise tensors with these maxima, and return the scales of the next use."""
    for slot, amax in enumerate(maxima):
        history.note(slot, torch.tensor(amax))
    advance_together([history], None)
    return history.scale_Q.tolist()


def test_scales_follow_the_largest_of_the_last_1024_maxima() -> None:
    """Fails if the history is longer or shorter, forgets the newest, or mixes tensors."""
    history = AmaxHistory(2, Fp8Format.e5m2)
    random = np.random.default_rng(0)
    past = [deque(maxlen=DELAYED_HISTORY_STEPS) for _ in range(2)]
    for step in range(DELAYED_HISTORY_STEPS + 40):
        maxima = [float(np.float32(amax)) for amax in random.exponential(size=2)]
        if step in (3, 30):
            maxima[step % 2] = 1e3  # leaves the window 1024 uses later
        for one, amax in zip(past, maxima, strict=True):
            one.append(amax)
        wanted = [float(np.float32(57344) / np.float32(max(one))) for one in past]
        assert use(history, *maxima) == wanted, step


def test_the_first_use_has_a_scale_of_one_and_the_largest_of_two_notes_counts() -> None:
    """Fails if a history starts elsewhere, or a second note between two advances hides the first."""
    history = AmaxHistory(1, Fp8Format.e4m3)
    assert history.scale_Q.tolist() == [1.0]
    history.note(0, torch.tensor(7.0))
    assert use(history, 3.5) == [64.0]


@pytest.mark.parametrize(("amax", "scale"), [(0.0, 64.0), (float("inf"), 64.0), (1.0, 64.0), (14.0, 32.0)])
def test_nothing_seen_and_infinity_leave_the_scale(amax: float, scale: float) -> None:
    """Fails if an unused slot, or an overflow, resets a scale."""
    history = AmaxHistory(1, Fp8Format.e4m3)
    use(history, 7.0)
    before = history.amax_LQ.clone()
    assert use(history, amax) == [scale]
    assert torch.equal(before, history.amax_LQ) == (amax == 0)  # an unused slot does not age


def test_a_maximum_too_small_for_a_scale_gives_the_largest_number() -> None:
    """Fails if a scale can become infinite."""
    assert use(AmaxHistory(1, Fp8Format.e4m3), 1e-40) == [torch.finfo(torch.float32).max]


def scales_after_uses() -> DelayedScales:
    scales = DelayedScales(Fp8Format.e5m2)
    for amax in (3.0, 5.0):
        use(scales.forward, amax, 2 * amax)
        use(scales.backward, amax / 100)
    scales.forward.note(0, torch.tensor(9.0))
    return scales


def test_bytes_bring_back_the_state() -> None:
    """Fails if a checkpoint loses a scale, a maximum, or what was noted since the last advance."""
    scales, loaded = scales_after_uses(), DelayedScales(Fp8Format.e5m2)
    assert not same(scales, loaded)
    loaded.from_bytes(scales.to_bytes())
    assert same(scales, loaded)
    assert use(loaded.forward, 1.0) == use(scales.forward, 1.0)


@dataclass
class DelayedScaling:
    """Stands in for Transformer Engine's recipe, which is in the bytes its layers write."""

    margin: int = 0
    amax_history_len: int = 1024


def test_bytes_of_transformer_engine_are_read_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a checkpoint written on a GPU cannot go on on a CPU because of the recipe object inside."""
    scales = scales_after_uses()
    library = types.ModuleType("transformer_engine.common.recipe")
    library.DelayedScaling = DelayedScaling
    monkeypatch.setattr(DelayedScaling, "__module__", library.__name__)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common", types.ModuleType("transformer_engine.common"))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    state = pickle.loads(scales.to_bytes().numpy().tobytes())
    written = pickle.dumps({"recipe": DelayedScaling(), **state})
    monkeypatch.delitem(sys.modules, library.__name__)
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(written)
    loaded = DelayedScales(Fp8Format.e5m2)
    loaded.from_bytes(torch.frombuffer(bytearray(written), dtype=torch.uint8))
    assert same(scales, loaded)
