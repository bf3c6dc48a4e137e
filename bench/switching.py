"""How long do attaching, switching, loading and merging take, beside PEFT on the same model and file?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import gossamer as gs
from bench.common import Row, interleaved, report

BASE = "smollm2-135m"


def measure() -> list[Row]:
    """Pairs of operations that leave both models in the same state; states are compared by their logits."""
    gs.fetch(BASE)
    ours, theirs = (gs.load_base(BASE, dtype="float32")[0] for _ in range(2))
    tokens = torch.arange(1000, 1016)[None]
    with tempfile.TemporaryDirectory() as place:
        folders = [_adapter(ours, seed).save(Path(place) / str(seed)) for seed in (1, 2)]
        peft: Any = PeftModel.from_pretrained(theirs, str(folders[0]), "a").eval()
        peft.load_adapter(str(folders[1]), "b")
        for name, folder in zip("ab", folders, strict=True):
            gs.attach(ours, gs.Adapter.load(folder), name)
        for name in "ab":
            gs.use(ours, name)
            peft.set_adapter(name)
            with torch.inference_mode():
                torch.testing.assert_close(ours(tokens).logits, peft(tokens).logits, rtol=1e-3, atol=1e-3)
        rows: list[Row] = []
        for what, (mine, other) in _operations(ours, peft, folders[0]).items():
            times = interleaved({"ours": mine, "PEFT": other}, rounds=9)
            rows.append(
                {
                    "operation": what,
                    "ours, median ms": round(times["ours"].median * 1e3, 3),
                    "PEFT, median ms": round(times["PEFT"].median * 1e3, 3),
                    "ours min..max": f"{times['ours'].min * 1e3:.3f}..{times['ours'].max * 1e3:.3f}",
                    "PEFT min..max": f"{times['PEFT'].min * 1e3:.3f}..{times['PEFT'].max * 1e3:.3f}",
                }
            )
        return rows


def _adapter(model: Any, seed: int) -> gs.Adapter:
    gs.attach(model, gs.LoRA(r=8), "made", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gs.trainable_parameters(model, "made").values():
            parameter.normal_(std=0.01, generator=generator)
    adapter = gs.capture(model, "made")
    gs.detach(model)
    return adapter


def _operations(ours: Any, peft: Any, folder: Path) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What is timed: each leaves its model as it was, or in the state of its twin."""

    def load_ours() -> None:
        gs.attach(ours, gs.Adapter.load(folder), "c")
        gs.detach(ours, "c")

    def load_theirs() -> None:
        peft.load_adapter(str(folder), "c")
        peft.delete_adapter("c")

    def merge_ours() -> None:
        gs.use(ours, "a")
        gs.merge(ours)
        gs.unmerge(ours)

    def merge_theirs() -> None:
        peft.set_adapter("a")
        peft.merge_adapter()
        peft.unmerge_adapter()

    return {
        "switch between two adapters, there and back": (
            lambda: (gs.use(ours, "b"), gs.use(ours, "a")),
            lambda: (peft.set_adapter("b"), peft.set_adapter("a")),
        ),
        "load a 9.8 MB file, attach, detach": (load_ours, load_theirs),
        "merge and unmerge (ours restores every bit)": (merge_ours, merge_theirs),
    }


if __name__ == "__main__":
    report("switching", __doc__ or "", measure, "SmolLM2-135M, r=8 on 210 linear modules, float32.")
