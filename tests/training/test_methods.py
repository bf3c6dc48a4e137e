"""Every registered method trains through the same loop, saves, resumes, and its file computes what the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.methods import METHODS
from gossamer.models import tiny
from tests.adapters import tokens
from tests.training.test_resume import Killed, at, kill
from tests.training.toy_run import curve, fingerprint, toy_config, toy_train

ARCHITECTURE = {"bitfit": "gpt2"}  # Llama has no biases
FIELDS: dict[str, dict[str, Any]] = {"vera": {"r": 8}, "houlsby": {"bottleneck": 4}, "lin": {"bottleneck": 4}}


def model_with(name: str, **fields: Any) -> Any:
    model = tiny(ARCHITECTURE.get(name, "llama"))
    gs.attach(model, METHODS[name](**FIELDS.get(name, {}) | fields), seed=3)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_a_run(name: str, tmp_path: Path):
    run = toy_train(toy_config(tmp_path, epochs=4), model=(model := model_with(name)))
    losses = [loss for _, loss, *_ in curve(run.output)]
    assert losses[-1] < losses[0]
    stored = gs.Adapter.load(run.output / "adapter")
    assert stored == run.adapter
    fresh = tiny(ARCHITECTURE.get(name, "llama"))
    gs.attach(fresh, stored)
    with torch.no_grad():
        assert torch.equal(fresh(tokens()).logits, model.eval()(tokens()).logits)


@pytest.mark.parametrize(
    ("name", "fields"), [("dora", {"dropout": 0.1}), ("prompt", {}), ("full", {}), ("lora", {"start": "pissa"})]
)
def test_resumed(name: str, fields: dict[str, Any], tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    one = toy_train(toy_config(whole), model=model_with(name, **fields))
    config = toy_config(parts)
    with pytest.raises(Killed):
        toy_train(config, model=model_with(name, **fields), progress=at(5, kill))
    two = toy_train(config, model=model_with(name, **fields), resume=True)
    assert fingerprint(one.output) == fingerprint(two.output)


def test_new_tokens_that_no_batch_holds_yet(tmp_path: Path):
    """Rows of an embedding get a gradient only where they occur; that is no fault of the first step."""
    model = tiny("llama")
    gs.attach(model, gs.LoRA(r=2, trainable_tokens=(259, 300)))
    before = gs.capture(model).tensors["model.embed_tokens"]["trainable_tokens_delta"]
    run = toy_train(toy_config(tmp_path), model=model)
    assert torch.equal(run.adapter.tensors["model.embed_tokens"]["trainable_tokens_delta"], before)


def test_lora_plus(tmp_path: Path):
    plain, plus = tmp_path / "plain", tmp_path / "plus"
    for folder in (plain, plus):
        folder.mkdir()
    one = toy_train(toy_config(plain, max_steps=1, lr=1e-4), model=model_with("lora")).adapter
    two = toy_train(toy_config(plus, max_steps=1, lr=1e-4, lr_ratio=8.0), model=model_with("lora")).adapter
    for path in one.paths:
        moved, further = (adapter.tensors[path]["lora_B"].abs().max() for adapter in (one, two))
        torch.testing.assert_close(further, 8 * moved, rtol=1e-3, atol=0.0)
    with pytest.raises(UsageError, match="lr_ratio"):
        toy_train(toy_config(plain, output=plain / "ia3", lr_ratio=8.0), model=model_with("ia3"))
