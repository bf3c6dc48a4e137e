"""Progress: a few plain lines where there is no terminal, none where none are wanted."""

from __future__ import annotations

import io

import pytest

from gossamer import progress
from gossamer.pages.sizes import amount
from gossamer.progress import Bar, PlainLines, Silent, duration


def test_lines_come_every_few_seconds_and_at_the_end() -> None:
    stream, now = io.StringIO(), [0.0]
    lines = PlainLines(stream, every=5.0, clock=lambda: now[0])
    lines.start(8, "training")
    for _ in range(8):
        now[0] += 2.0
        lines.step(loss=1.5, lr=2e-4, tokens_per_second=1234.5, memory_bytes=1.5e9, step=1)
    lines.finish()
    shown = stream.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == ["3/8", "6/8", "8/8"]
    assert shown[0] == "training 3/8  loss 1.5000  lr 2.00e-04  1,234 tokens/s  1.50 GB  0:10 left"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75.2, "1:15"), (3725.0, "1:02:05")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(12, "12 bytes"), (1460, "1.5 kB"), (9.8e6, "9.8 MB"), (1.34e9, "1.34 GB")]
)
def test_amounts(nbytes: float, text: str) -> None:
    assert amount(nbytes) == text


def test_a_bar_only_on_a_terminal_that_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(progress.for_terminal(), PlainLines)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(progress.for_terminal(), Bar)
    monkeypatch.setenv("CI", "true")
    assert isinstance(progress.for_terminal(), PlainLines)


@pytest.mark.parametrize("kind", [Bar, Silent])
def test_the_others_take_the_same_calls(kind: type) -> None:
    shown = kind()
    shown.finish()
    for what in ("evaluating", "training"):
        shown.start(2, what)
        shown.step(loss=1.0)
        shown.say("a line with [brackets]")
    shown.finish()
