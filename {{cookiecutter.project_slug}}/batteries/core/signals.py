"""SIGTERM, SIGUSR1, Ctrl-C and a terminal that closes: stop at the end of a step, with everything saved."""

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
SECONDS_APART = 1.0  # torchrun passes on to its processes a Ctrl-C that the terminal has sent them already


class Preempted(Exception):
    """The run was asked to stop by signal `number`, and is saved."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


class SignalHandler:
    """Notes the first signal, for the loop to look at; another, a second later or more, ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._when > SECONDS_APART:
            os._exit(128 + number)
        if not self.received:
            self.received, self._when = number, time.monotonic()
