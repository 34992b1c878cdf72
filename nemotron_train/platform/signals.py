"""Remembers that somebody asked the run to stop, so that the trainer can finish the step and save first."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """The first stop signal this process received. Later ones change nothing: launchers pass on a Ctrl-C that the
    process got already."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def listen(self) -> None:
        """Install the handlers; call from the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
