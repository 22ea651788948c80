"""SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP stop a run at the end of a step, after a checkpoint."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
PR_SET_PDEATHSIG = 1  # see man 2 prctl
MIN_SECONDS_APART = 1.0  # torchrun forwards a Ctrl-C to processes that have already received it from the terminal


def terminate_with_parent() -> None:
    """On Linux, have this process receive SIGTERM, which saves the run, if the process that started it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Preempted(Exception):
    """A run that was stopped by signal `number` after it was saved."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


class SignalHandler:
    """Records the first signal; a second one, at least MIN_SECONDS_APART later, ends the process immediately.

    Use it as a context manager; the former handlers are restored at the end. Outside the main thread it does nothing,
    because Python allows signal handlers only there.

    Attributes:
        received: The number of the first signal; 0 before it.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._former_handlers: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._former_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            self._received_at = time.monotonic()
        elif time.monotonic() - self._received_at > MIN_SECONDS_APART:
            os._exit(128 + number)
