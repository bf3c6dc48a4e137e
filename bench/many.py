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
    few, many, peft_few, peft_many = (gs.load_base(BASE, dtype="float32")[0] for _ in range(4))
    config = LoraConfig(r=8, target_modules=TARGETS)
    theirs: list[Any] = [get_peft_model(model, config, "kept") for model in (peft_few, peft_many)]
    for model in (few, many):
        gs.attach(model, gs.LoRA(r=8), "kept")
    for number in range(COUNT - 2):
        gs.attach(many, gs.LoRA(r=8), f"n{number}")
        theirs[1].add_adapter(f"n{number}", config)
    took = _timed([_ours(few), _ours(many), *(_theirs(model, config) for model in theirs)])
    ids = torch.arange(1000, 1016)[None]
    with torch.inference_mode():
        torch.testing.assert_close(many(ids).logits, few(ids).logits, rtol=0, atol=0)  # untrained: they change nothing
        torch.testing.assert_close(theirs[1](ids).logits, few(ids).logits, rtol=1e-4, atol=1e-4)
    return [_row("ours", took[0], took[1]), _row("PEFT", took[2], took[3])]


def _row(library: str, second: list[float], last: list[float]) -> Row:
    return {
        "library": library,
        "2nd, median ms": round(statistics.median(second), 1),
        f"{COUNT}th, median ms": round(statistics.median(last), 1),
        "ratio": round(statistics.median(last) / statistics.median(second), 2),
        "2nd min..max": f"{min(second):.1f}..{max(second):.1f}",
        f"{COUNT}th min..max": f"{min(last):.1f}..{max(last):.1f}",
    }


def _ours(model: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return lambda: gs.attach(model, gs.LoRA(r=8), "one_more"), lambda: gs.detach(model, "one_more")


def _theirs(model: Any, config: LoraConfig) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return lambda: model.add_adapter("one_more", config), lambda: model.delete_adapter("one_more")


def _timed(pairs: list[tuple[Callable[[], Any], Callable[[], Any]]]) -> list[list[float]]:
    """Milliseconds of each attach, one round after another over all of them; detaching is not timed."""
    took: list[list[float]] = [[] for _ in pairs]
    for _ in range(ROUNDS + 1):
        for times, (attach, detach) in zip(took, pairs, strict=True):
            start = time.perf_counter()
            attach()
            times.append((time.perf_counter() - start) * 1e3)
            detach()
    return [times[1:] for times in took]  # the first round warms up


if __name__ == "__main__":
    report("many", "Does one more adapter cost more when many are attached already?", measure)
