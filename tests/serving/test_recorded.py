"""Recorded steps: without a GPU the same tensors are read again where a graph would be replayed."""

from __future__ import annotations

import sys

import pytest

from gossamer import kernels
from gossamer.kernels import routed
from tests.serving import recorded_cases


@pytest.fixture
def slotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters in slots on a CPU too."""
    monkeypatch.setitem(sys.modules, "gossamer.kernels.triton_routed", recorded_cases.PlainKernels)
    monkeypatch.setattr(kernels, "triton_routed", recorded_cases.PlainKernels, raising=False)
    monkeypatch.setattr(routed, "triton_takes", lambda _: True)


@pytest.mark.usefixtures("slotted")
def test_everybody_gets_what_he_gets_unrecorded() -> None:
    recorded_cases.check(recorded_cases.again)


@pytest.mark.usefixtures("slotted")
def test_a_recording_that_reads_nothing_again_is_found() -> None:
    with pytest.raises(AssertionError):
        recorded_cases.check(recorded_cases.unread)


@pytest.mark.gpu
def test_everybody_gets_what_he_gets_unrecorded_on_a_gpu() -> None:
    recorded_cases.check(True, "cuda")
