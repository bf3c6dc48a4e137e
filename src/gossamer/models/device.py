"""What a device has left, how memory is given back, and what it looks like when none is left."""

import ctypes
import sys
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that a run may still take; None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.exists():
        return None
    lines = (line.split() for line in known.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is asked for next, up to 256 MiB; elsewhere nothing is changed.

    Else it gives larger pieces back to the system at once and takes them again a moment later, page by page: a
    decoding step, which makes the same few tensors over and over, takes up to 1.4 times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 1 << 28)
        mallopt(mmap_threshold, 1 << 25)  # the most it takes


def ran_out(error: Exception) -> bool:
    """Whether an error of torch's or Python's means that memory ran out."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (type(error) is RuntimeError and "can't allocate memory" in str(error))
