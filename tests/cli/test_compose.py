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
from gossamer.errors import StateError, UsageError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder


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


def test_weights_by_module_and_what_is_no_weight(tmp_path: Path):
    parts = [folder(tmp_path / "a", 1), folder(tmp_path / "b", 2)]
    done = json.loads(
        ran(compose, *parts, "--weights", r"m\..*=2;.*=7", "1", "--output", str(tmp_path / "c"), "--json")
    )
    a, b, value = (gs.Adapter.load(part) for part in (*parts, done["output"]))
    torch.testing.assert_close(value.delta("m.a"), 2 * a.delta("m.a") + b.delta("m.a"))
    for words in (["--weights=a=b"], ["--weights=heavy"]):
        result = CliRunner().invoke(compose.command, [*parts, *words, "--output", str(tmp_path / "d")])
        assert result.exit_code == 2
        assert "neither a number nor PATTERN=NUMBER" in result.output
    with pytest.raises(UsageError, match="learned on a base, or given"):
        ran(compose, *parts, "--learn", "rows.jsonl", "--output", str(tmp_path / "d"))


def test_weights_are_learned_from_rows(tmp_path: Path):
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    base = write_model_folder(model, tokenizer, tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": "aaaa"}) + "\n" for n in range(4)))
    config = gs.TrainConfig(data={"train": str(rows)}, max_steps=20, lr=2e-2, output=str(tmp_path / "run"))  # pyright: ignore[reportArgumentType]
    gs.attach(model, gs.LoRA(r=2))
    helps = str(gs.train(model, tokenizer, config).adapter.save(tmp_path / "helps"))
    harms = str((-gs.Adapter.load(helps)).save(tmp_path / "harms"))
    words = ["--learn", str(rows), "--base", str(base), "--steps", "20", "--lr", "0.1", "--output"]
    told = ran(compose, helps, harms, *words, str(tmp_path / "both"))
    value = gs.Adapter.load(tmp_path / "both")
    (first, second) = (sum(numbers.values()) for numbers in value.provenance["weights"])
    assert first > second, "the adapter that learned these rows gets more weight than its opposite"
    assert f"{helps}: weights " in told
    gs.detach(model)
    before = gs.evaluate(model, tokenizer, rows)["loss"]
    gs.attach(model, value)
    assert gs.evaluate(model, tokenizer, rows)["loss"] < 0.8 * before


def test_resize(tmp_path: Path):
    place = folder(tmp_path / "a", 1)
    told = ran(resize, place, "--rank", "1", "--output", str(tmp_path / "small"))
    value = gs.Adapter.load(tmp_path / "small")
    assert value.tensors["m.a"]["lora_A"].shape[0] == 1
    assert "42 numbers became 14" in told
    assert f"error {value.provenance['error']:.3g}" in told
    done = json.loads(ran(resize, place, "--energy", "0.9", "--pooled", "--output", str(tmp_path / "c"), "--json"))
    assert done["error"] ** 2 <= 0.1
