"""What every benchmark shares: fair timing, a description of the machine, and a result file of one shape.

A benchmark is a file with a function that returns rows, and one call at its end:

    if __name__ == "__main__":
        report("merge", "What does a merged adapter cost?", measure)

`python -m bench.merge` prints the rows; `--json FILE` also writes them for docs/numbers.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PEERS = ("torch", "transformers", "peft", "safetensors")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over the rounds."""

    min: float
    median: float
    max: float

    def row(self, unit: str = "ms") -> dict[str, float]:
        """Three columns, in milliseconds or seconds."""
        factor = {"ms": 1e3, "s": 1.0}[unit]
        return {f"{name} {unit}": round(getattr(self, name) * factor, 3) for name in ("min", "median", "max")}


def interleaved(contenders: Mapping[str, Callable[[], Any]], *, rounds: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Time contenders in turn, A B C C B A, so that a slow minute of the machine falls on all of them alike.

    Args:
        contenders: name -> a call without arguments that does the whole work (and waits for the device).
        rounds: timed calls of each.
        warmup: untimed calls of each before.

    Returns:
        name -> seconds; compare medians, and trust a difference only when the ranges part.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = [*contenders]
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
        order.reverse()
    return {name: Timing(min(took), statistics.median(took), max(took)) for name, took in seconds.items()}


def machine() -> dict[str, Any]:
    """Where and with what a result was measured: processor, cores, memory, device, versions, commit."""
    import torch

    found: dict[str, Any] = {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: _version(name) for name in PEERS} | {"commit": _commit()}


def _processor() -> str:
    """The processor's marketing name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit measured, with "+" when the tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "none") + ("+" if git("status", "--porcelain") else "")


def write_result(path: Path, name: str, question: str, rows: Sequence[Row], notes: str = "") -> None:
    """Write one result file, the shape that `bench.numbers` renders."""
    result = {
        "name": name,
        "question": question,
        "command": shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": list(rows),
        "notes": notes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def report(name: str, question: str, measure: Callable[[], Sequence[Row]], notes: str = "") -> None:
    """Measure, print the rows, and write them where `--json FILE` says."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    path = parser.parse_args().json
    rows = measure()
    for row in rows:
        print("  ".join(f"{column}: {value}" for column, value in row.items()))
    if path:
        write_result(path, name, question, rows, notes)
