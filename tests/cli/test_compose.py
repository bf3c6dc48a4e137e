"""gossamer compose and resize, on small adapter folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import gossamer as gs
from gossamer.cli import compose, resize
from gossamer.errors import StateError


def folder(place: Path, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "m.a": {
            "lora_A": torch.randn(3, 8, generator=generator),
            "lora_B": torch.randn(6, 3, generator=generator),
        }
    }
    return str(gs.Adapter(gs.LoRA(r=3, target_modules=("m.a",)), tensors).save(place))


def ran(verb: Any, *words: str) -> str:
    result = CliRunner().invoke(verb.command, [*words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("order", [0, 1])
def test_compose(tmp_path: Path, order: int):
    parts = [folder(tmp_path / "a", 1), folder(tmp_path / "b", 2)]
    weights = ["--weights", "0.7", "-0.3"]
    words = [*parts, *weights] if order else [*weights, *parts]
    done = json.loads(ran(compose, *words, "--output", str(tmp_path / "sum"), "--json"))
    value = gs.Adapter.load(tmp_path / "sum")
    a, b = (gs.Adapter.load(part) for part in parts)
    torch.testing.assert_close(value.delta("m.a"), 0.7 * a.delta("m.a") - 0.3 * b.delta("m.a"))
    assert done["distance"] < 1e-6
    assert done["sha256"] == value.digest
    with pytest.raises(StateError, match="exists already"):
        ran(compose, *words, "--output", str(tmp_path / "sum"))


def test_compose_by_another_method(tmp_path: Path):
    parts = [folder(tmp_path / "a", 1), folder(tmp_path / "b", 2)]
    place = str(tmp_path / "ties")
    told = ran(compose, *parts, "--method", "ties", "--density", "0.5", "--rank", "2", "--output", place)
    value = gs.Adapter.load(place)
    assert value.provenance["options"] == {"density": 0.5}
    assert value.tensors["m.a"]["lora_A"].shape[0] == 2
    assert f"distance from the exact sum {value.provenance['distance']:.3g}" in told


def test_resize(tmp_path: Path):
    place = folder(tmp_path / "a", 1)
    told = ran(resize, place, "--rank", "1", "--output", str(tmp_path / "small"))
    value = gs.Adapter.load(tmp_path / "small")
    assert value.tensors["m.a"]["lora_A"].shape[0] == 1
    assert "42 numbers became 14" in told
    assert f"error {value.provenance['error']:.3g}" in told
    done = json.loads(ran(resize, place, "--energy", "0.9", "--pooled", "--output", str(tmp_path / "c"), "--json"))
    assert done["error"] ** 2 <= 0.1
