"""Showing how far a run is: a bar on a terminal, lines elsewhere, or nothing."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """What long work tells whoever watches; any object with these four methods will do."""

    def start(self, total: int, what: str) -> None:
        """A stretch of work with `total` steps begins; one runs at a time."""
        ...

    def step(self, **metrics: float) -> None:
        """One of its steps is done. Training gives loss, lr, tokens_per_second and memory_bytes."""
        ...

    def say(self, line: str) -> None:
        """A line that stays."""
        ...

    def finish(self) -> None:
        """The stretch is over, or was stopped."""
        ...


class Silent:
    """Shows nothing."""

    def start(self, total: int, what: str) -> None:
        """Nothing."""

    def step(self, **metrics: float) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class PlainLines:
    """Plain lines on a stream, at most one every few seconds: for log files and continuous integration."""

    def __init__(self, stream: TextIO, *, every: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.every, self.clock = stream, every, clock
        self.what, self.total, self.done = "", 0, 0
        self.started = self.shown = clock()

    def start(self, total: int, what: str) -> None:
        """See `Progress`."""
        self.what, self.total, self.done = what, total, 0
        self.started = self.shown = self.clock()

    def step(self, **metrics: float) -> None:
        """See `Progress`."""
        self.done += 1
        now = self.clock()
        if now - self.shown >= self.every or self.done == self.total:
            self.shown = now
            left = (now - self.started) / self.done * (self.total - self.done)
            self.say(
                "  ".join([f"{self.what} {self.done:,}/{self.total:,}", *describe(metrics), f"{duration(left)} left"])
            )

    def say(self, line: str) -> None:
        """See `Progress`."""
        print(line, file=self.stream, flush=True)

    def finish(self) -> None:
        """Nothing."""


class Bar:
    """A bar on a terminal, with the time left, loss, tokens a second and memory."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self.console = Console(stderr=True)
        self.make = lambda: RichProgress(*columns, console=self.console, transient=True)
        self.live: RichProgress | None = None

    def start(self, total: int, what: str) -> None:
        """See `Progress`."""
        self.finish()
        self.live = self.make()
        self.task = self.live.add_task(what, total=total, figures="")
        self.live.start()

    def step(self, **metrics: float) -> None:
        """See `Progress`."""
        if self.live:
            self.live.update(self.task, advance=1, figures="  ".join(describe(metrics)))

    def say(self, line: str) -> None:
        """See `Progress`."""
        self.console.print(line, markup=False, highlight=False)

    def finish(self) -> None:
        """See `Progress`."""
        if self.live:
            self.live.stop()
            self.live = None


def for_terminal() -> Progress:
    """A bar if the error stream is a terminal that wants one, plain lines otherwise."""
    plain = any(os.environ.get(name) for name in ("CI", "NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return Bar() if sys.stderr.isatty() and not plain else PlainLines(sys.stderr)


_FORMATS: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "lr": lambda value: f"lr {value:.2e}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "memory_bytes": lambda value: f"{value / 1e9:.2f} GB",  # one unit, so that a line does not jump
}


def describe(metrics: dict[str, float]) -> list[str]:
    """The figures that are shown of a step, in their units."""
    return [form(metrics[name]) for name, form in _FORMATS.items() if name in metrics]


def duration(seconds: float) -> str:
    """75.2 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
