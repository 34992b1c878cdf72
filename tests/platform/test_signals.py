"""Is a request to stop remembered, and the first one kept?"""

import os
import signal
from collections.abc import Iterator

import pytest

from nemotron_train.platform.signals import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_is_the_one_that_is_named(first: signal.Signals) -> None:
    """Fails if a signal kills the process, raises into the step under way, or a launcher's second one replaces the
    first."""
    stop = StopRequest()
    stop.listen()
    assert stop.signal_name is None
    os.kill(os.getpid(), first)
    assert stop.signal_name == first.name
    for later in STOP_SIGNALS:
        os.kill(os.getpid(), later)
    assert stop.signal_name == first.name
