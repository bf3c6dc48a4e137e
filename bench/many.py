"""Does one more adapter cost more when many are attached already? Attaching the 1st and the 50th, beside PEFT."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import gossamer as gs
from bench.common import Row, report

BASE, COUNT, ROUNDS = "smollm2-135m", 50, 7
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure() -> list[Row]:
    """The time of one attach with so many adapters there already; the model computes the same at both counts."""
    gs.fetch(BASE)
    ours, theirs = (gs.load_base(BASE, dtype="float32")[0] for _ in range(2))
    ids = torch.arange(1000, 1016)[None]
    with torch.inference_mode():
        base = ours(ids).logits
    gs.attach(ours, gs.LoRA(r=8), "kept")
    config = LoraConfig(r=8, target_modules=TARGETS)
    peft: Any = get_peft_model(theirs, config, "kept")
    first = {"ours": _timed(*_ours(ours)), "PEFT": _timed(*_theirs(peft, config))}
    for number in range(COUNT - 2):
        gs.attach(ours, gs.LoRA(r=8), f"n{number}")
        peft.add_adapter(f"n{number}", config)
    last = {"ours": _timed(*_ours(ours)), "PEFT": _timed(*_theirs(peft, config))}
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, base, rtol=0, atol=0)  # untrained adapters change nothing
        torch.testing.assert_close(peft(ids).logits, base, rtol=1e-4, atol=1e-4)
    return [
        {
            "library": name,
            "2nd, median ms": round(first[name][0], 1),
            f"{COUNT}th, median ms": round(last[name][0], 1),
            "ratio": round(last[name][0] / first[name][0], 2),
            "2nd min..max": first[name][1],
            f"{COUNT}th min..max": last[name][1],
        }
        for name in ("ours", "PEFT")
    ]


def _ours(model: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return lambda: gs.attach(model, gs.LoRA(r=8), "one_more"), lambda: gs.detach(model, "one_more")


def _theirs(model: Any, config: LoraConfig) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return lambda: model.add_adapter("one_more", config), lambda: model.delete_adapter("one_more")


def _timed(attach: Callable[[], Any], detach: Callable[[], Any]) -> tuple[float, str]:
    """Median of the rounds in milliseconds, and their range; only attaching is timed."""
    took = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        attach()
        took.append((time.perf_counter() - start) * 1e3)
        detach()
    took = took[1:]  # the first one warms up
    return statistics.median(took), f"{min(took):.1f}..{max(took):.1f}"


if __name__ == "__main__":
    report("many", "Does one more adapter cost more when many are attached already?", measure)
