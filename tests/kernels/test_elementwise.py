"""The door to the memory-bound parts, and Triton's kernels behind it in Triton's interpreter, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer.errors import UsageError
from gossamer.kernels import elementwise

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import torch
from gossamer.kernels import elementwise
from tests.kernels import elementwise_cases as cases
from tests.kernels import routed_cases
assert elementwise.described() == "triton on CUDA"
for dtype in cases.DTYPES:
    for size in cases.SIZES:
        for offset in (False, True):
            cases.check_norm(size, dtype, offset)
        for activation in elementwise.ACTIVATIONS:
            cases.check_gated(size, dtype, activation)
    for size in [(5, 3, 8), (2, 4, 3, 10), (1, 1, 2), (0, 3, 8)]:
        cases.check_rotary(size, dtype)
    routed_cases.check(dtype)
print("all equal")
"""


@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="Triton has wheels for Linux on x86-64 alone"
)
def test_every_kernel_equals_float64_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "GOSSAMER_KERNELS": "triton", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "all equal", done.stderr


def test_a_cpu_tensor_stays_eager_unless_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ("auto", "eager"):
        monkeypatch.setenv("GOSSAMER_KERNELS", said)
        assert elementwise._kernels(torch.zeros(2, 2)) is None
    assert elementwise.described() == "eager (GOSSAMER_KERNELS)"


def test_a_wrong_word_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_KERNELS", "cuda")
    with pytest.raises(UsageError, match="GOSSAMER_KERNELS"):
        elementwise._kernels(torch.zeros(2, 2))


def test_doctor_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_KERNELS", "auto")
    monkeypatch.setattr(elementwise, "_triton", lambda: None)
    assert elementwise.described() == "eager: triton is not installed"
