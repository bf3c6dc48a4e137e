"""What a device has left, and freed memory that is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gossamer.models.device import free_bytes

GROWN_AGAIN = """
import resource, torch
from gossamer.models.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        torch.empty(1 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


def test_free_memory_is_that_of_the_system() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_what_was_freed_is_not_asked_of_the_system_again() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    again = subprocess.run([sys.executable, "-c", GROWN_AGAIN], capture_output=True, text=True, check=True, env=plain)
    assert int(again.stdout) < 1000  # 200 tensors of 1,024 pages each, had they been given back
