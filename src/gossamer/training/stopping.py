"""What ends a run before its last step: a signal, or a held-out loss that has not become better for a while.

Source: Prechelt 1998, "Early Stopping - But When?", section 2.2: the criterion UP_s.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

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


@dataclass
class Stopping:
    """What the evaluations so far say; the run ends with the factors of the best. Without patience they are counted.

    Attributes:
        patience: evaluations in a row that may be no better than the best one.
        evaluated: the step of the last evaluation.
        best, best_step: the lowest loss, and the step after which it was measured.
        waited: evaluations since then.
    """

    patience: int | None
    evaluated: int = 0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    @property
    def over(self) -> bool:
        """Whether the run has come to its end."""
        return self.patience is not None and self.waited >= self.patience

    def see(self, step: int, loss: float) -> bool:
        """Take a figure in. Whether these factors are to be kept, as the best so far."""
        self.evaluated = step
        if self.patience is None:
            return False
        better = self.best is None or loss < self.best
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best, self.best_step = loss, step
        return better

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `Stopping(**state)` is the same again."""
        return asdict(self)
