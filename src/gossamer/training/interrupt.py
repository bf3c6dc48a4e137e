"""Stopping a run without losing it: the first signal asks, the second one insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Whether a signal asked the run to stop, and which: empty until then."""

    signal = ""

    def __bool__(self) -> bool:
        return bool(self.signal)


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a request that the loop meets at its next step boundary.

    A second signal raises `KeyboardInterrupt` at once. The handlers that were there before come back after the block.
    Outside the main thread, where Python allows no handlers, signals keep their meaning.
    """
    request = StopRequest()

    def ask(number: int, _: FrameType | None) -> None:
        if request:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
