"""What was tuned is found again: the adapter that was merged, the best rank there is, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.cli import main
from gossamer.errors import BaseMismatchError, NonFiniteError, StateError, UnsupportedError, UsageError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from tests.adapters import bits, same_bits, tokens, trained

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_merged_adapter_is_found_again(kind: str):
    tuned = tiny(kind)
    adapter = trained(tuned, gs.LoRA(r=3))
    gs.merge(tuned, keep=False)
    found = gs.extract(tiny(kind), tuned, r=3)
    assert set(found.paths) == set(adapter.paths)
    assert found.provenance["left"] == []
    assert found.provenance["error"] < 1e-4
    for path in adapter.paths:
        torch.testing.assert_close(found.delta(path), adapter.delta(path), rtol=0, atol=1e-5)
    again = tiny(kind)
    gs.attach(again, found)  # it knows its base
    torch.testing.assert_close(again(tokens()).logits, tuned(tokens()).logits, rtol=0, atol=1e-4)


def spread(model: Any, seed: int = 0, falling: float = 0.8) -> dict[str, torch.Tensor]:
    """Change every linear weight by a matrix whose singular values fall."""
    changes = {}
    for number, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            draw = torch.Generator().manual_seed(seed + number)
            left, _ = torch.linalg.qr(torch.randn(module.out_features, 24, generator=draw))
            right, _ = torch.linalg.qr(torch.randn(module.in_features, 24, generator=draw))
            changes[path] = (left * falling ** torch.arange(24)) @ right.T
            module.weight.data += changes[path]
    return changes


@pytest.mark.parametrize("r", [2, 4, 20])
def test_no_adapter_of_that_rank_is_nearer(r: int):
    tuned = tiny("llama")
    spread(tuned)
    base = tiny("llama")
    found = gs.extract(base, tuned, r=r)
    for path, error in found.provenance["errors"].items():
        change = tuned.get_submodule(path).weight.data.double() - base.get_submodule(path).weight.data.double()
        values = torch.linalg.svdvals(change)
        best = (values[r:].square().sum() / values.square().sum()).sqrt().item()
        assert (found.delta(path) - change).norm().item() / change.norm().item() == pytest.approx(error, rel=1e-3)
        assert error == pytest.approx(best, rel=0.01)


def test_energy_gives_each_module_its_own_rank():
    tuned, base = tiny("llama"), tiny("llama")
    spread(tuned)
    tuned.get_submodule(Q).weight.data = base.get_submodule(Q).weight.data + torch.ones(64, 64)
    found = gs.extract(base, tuned, energy=0.9)
    ranks = {path: slots["lora_A"].shape[0] for path, slots in found.tensors.items()}
    assert ranks[Q] == 1
    assert ranks["model.layers.1.self_attn.q_proj"] == 6  # 1 - 0.64^5 < 0.9 <= 1 - 0.64^6
    assert all(error <= 0.1**0.5 + 1e-4 for error in found.provenance["errors"].values())


def test_what_no_factors_hold_is_named_or_kept():
    tuned, base = tiny("llama"), tiny("llama")
    spread(tuned)
    tuned.model.norm.weight.data += 0.5
    tuned.model.embed_tokens.weight.data[3] += 1.0
    found = gs.extract(base, tuned, r=24)
    assert found.provenance["left"] == ["model.embed_tokens.weight", "model.norm.weight"]
    whole = gs.extract(base, tuned, r=24, whole=True)
    assert whole.provenance["left"] == []
    gs.attach(base, whole)
    torch.testing.assert_close(base(tokens()).logits, tuned(tokens()).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "spec", [gs.DoRA(r=2), gs.LoRA(r=2, start="pissa"), gs.VeRA(r=8)], ids=["dora", "pissa", "vera"]
)
def test_any_change_of_weights_becomes_lora(spec: Any, tmp_path: Path):
    model = tiny("llama")
    adapter = trained(model, spec)
    wanted = model(tokens()).logits
    gs.detach(model)
    before = bits(model)
    full = gs.as_lora(model, adapter, r=64)
    small = gs.as_lora(model, adapter, energy=0.5)
    assert same_bits(bits(model), before)
    assert full.provenance["error"] < 1e-4 < small.provenance["error"] <= 0.5**0.5
    gs.attach(model, gs.Adapter.load(full.save(tmp_path / "full")))
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=0, atol=1e-3)


def test_refusals():
    base, tuned = tiny("llama"), tiny("llama")
    with pytest.raises(UsageError, match="rank"):
        gs.extract(base, tuned)
    with pytest.raises(StateError, match="nothing to extract"):
        gs.extract(base, tuned, r=2)
    with pytest.raises(BaseMismatchError, match="differ in"):
        gs.extract(base, tiny("gpt2"), r=2)
    tuned.get_submodule(Q).weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="difference"):
        gs.extract(base, tuned, r=2)
    model = tiny("llama")
    for spec in (gs.Houlsby(), gs.NormTuning(), gs.PromptTuning(num_virtual_tokens=2)):
        value = trained(tiny("llama"), spec)
        with pytest.raises((UnsupportedError, StateError)):
            gs.as_lora(model, value, r=2)
    assert gs.attached(model) == ()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = write_model_folder(tiny("llama"), tiny_tokenizer(), tmp_path / "base")
    tuned = tiny("llama")
    spread(tuned)
    write_model_folder(tuned, tiny_tokenizer(), tmp_path / "tuned")
    dora = trained(tiny("llama"), gs.DoRA(r=2)).save(tmp_path / "dora")
    words = ["extract", str(base), str(tmp_path / "tuned"), "-r", "24", "--output", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["modules"], told["left"]) == (14, [])
    assert told["error"] < 1e-3
    assert gs.Adapter.load(tmp_path / "out").digest == told["sha256"]
    assert main(words) == 2
    capsys.readouterr()
    assert main(["extract", str(base), str(dora), "--energy", "0.9", "--output", str(tmp_path / "lora")]) == 0
    assert "misses" in capsys.readouterr().out
    assert gs.Adapter.load(tmp_path / "lora").spec.name == "lora"
