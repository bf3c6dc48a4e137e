"""What PEFT's `add_weighted_adapter` makes of two adapters, where it is right: the same numbers from `gs.combine`.

Where it is wrong (sums with rsLoRA) see test_where_peft_is_wrong.py. TIES' weights mean something else there: PEFT's 1
for each is the paper's mean of what agrees, which is 1 / n for each here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import gossamer as gs
from tests.conformance.oracle import Toys, moved

TARGETS = ["q_proj", "down_proj"]
FULL = 64
"""No matrix of the toy has more directions on its shorter side."""


@pytest.fixture
def pair(toy: Toys, tmp_path: Path) -> tuple[PeftModel, list[gs.Adapter]]:
    """Two adapters on PEFT's wrapper, of one rank and different alphas, and as values."""
    wrapped: Any = get_peft_model(toy("llama").eval(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    wrapped.add_adapter("b", LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS))
    for name in ("default", "b"):
        wrapped.set_adapter(name)
        moved(wrapped, 0.2)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    return wrapped, [gs.Adapter.load(tmp_path), gs.Adapter.load(tmp_path / "b")]


@pytest.mark.parametrize(
    ("kind", "theirs", "ours", "method", "options"),
    [
        ("cat", [0.7, 0.3], [0.7, 0.3], "exact", {}),
        ("svd", [0.7, -0.3], [0.7, -0.3], "svd", {"r": 4}),
        ("linear", [0.7, 0.3], [0.7, 0.3], "linear", {}),
        ("linear", [0.7, -0.3], [0.7, -0.3], "linear", {}),
        ("magnitude_prune_svd", [0.7, 0.3], [0.7, 0.3], "magnitude_prune", {"density": 0.5, "r": "full"}),
        ("ties_svd", [1.0, 1.0], [0.5, 0.5], "ties", {"density": 0.5, "r": "full"}),
    ],
)
def test_the_same_numbers(
    pair: tuple[PeftModel, list[gs.Adapter]],
    kind: str,
    theirs: list[float],
    ours: list[float],
    method: str,
    options: dict[str, Any],
):
    wrapped, adapters = pair
    rank = options["r"] if isinstance(options.get("r"), int) else FULL
    more = {"density": options["density"]} if "density" in options else {}
    more |= {"svd_rank": rank} if kind.endswith("svd") else {}
    wrapped.add_weighted_adapter(["default", "b"], theirs, "both", combination_type=kind, **more)
    value = gs.combine(adapters, ours, method=method, **options)
    for path in value.paths:
        layer: Any = wrapped.get_submodule(f"base_model.model.{path}")
        expected = layer.get_delta_weight("both")
        torch.testing.assert_close(value.delta(path), expected, rtol=0, atol=2e-6 * expected.norm().item())
