"""What does an adapter cost when the model runs: beside the weights, merged into them, and in PEFT?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import gossamer as gs
from bench.common import Row, interleaved, report

BASE = "smollm2-135m"
TOLERANCE = 1e-3


@torch.inference_mode()
def measure() -> list[Row]:
    """One forward over 64 tokens in float32; outputs are compared before the clock starts."""
    gs.fetch(BASE)
    models: dict[str, Any] = {
        name: gs.load_base(BASE, dtype="float32")[0] for name in ("base", "beside", "merged", "peft")
    }
    gs.attach(models["beside"], gs.LoRA(r=8))
    for parameter in gs.trainable_parameters(models["beside"], "default").values():
        parameter.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    adapter = gs.capture(models["beside"])
    gs.attach(models["merged"], adapter)
    gs.merge(models["merged"])
    with tempfile.TemporaryDirectory() as folder:
        models["peft"] = PeftModel.from_pretrained(models["peft"], str(adapter.save(Path(folder) / "adapter"))).eval()

    tokens = torch.arange(1000, 1064)[None]
    out = {name: model(tokens).logits for name, model in models.items()}
    for name in ("merged", "peft"):
        torch.testing.assert_close(out[name], out["beside"], rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(out["beside"], out["base"], rtol=TOLERANCE, atol=TOLERANCE), "the adapter does nothing"

    times = interleaved({name: lambda model=model: model(tokens) for name, model in models.items()}, rounds=21)
    base = times["base"].median
    return [{"model": name, **took.row(), "over base": round(took.median / base, 3)} for name, took in times.items()]


if __name__ == "__main__":
    report("latency", __doc__ or "", measure, "SmolLM2-135M, r=8 on every linear module, batch 1, 64 tokens, float32.")
