"""merge(keep=False): folded in for good, and not a trace of an adapter left."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import gossamer as gs
from gossamer.errors import StateError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from tests.adapters import tokens, trained


def test_the_model_is_plain_again_and_keeps_the_change():
    model = tiny("llama")
    plain = {path: {*vars(module)} for path, module in copy.deepcopy(model).named_modules()}
    trained(model, gs.LoRA(r=4))
    beside = model(tokens()).logits
    gs.merge(model, keep=False)
    torch.testing.assert_close(model(tokens()).logits, beside, rtol=0, atol=1e-5)
    assert gs.attached(model) == ()
    assert {path: {*vars(module)} for path, module in model.named_modules()} == plain
    with pytest.raises(StateError, match="no adapter is attached"):
        gs.unmerge(model)


def test_other_adapters_stay_beside():
    model = tiny("llama")
    trained(model, gs.LoRA(r=4), "folded", 1)
    trained(model, gs.LoRA(r=2), "kept", 2)
    gs.use(model, "folded", "kept")
    both = model(tokens()).logits
    gs.merge(model, "folded", keep=False)
    assert gs.attached(model) == gs.active(model) == ("kept",)
    torch.testing.assert_close(model(tokens()).logits, both, rtol=0, atol=1e-5)


def test_a_model_with_adapters_is_not_written_as_a_plain_one(tmp_path: Path):
    model = tiny("llama")
    trained(model, gs.LoRA(r=4))
    with pytest.raises(StateError, match="adapters are attached"):
        write_model_folder(model, tiny_tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_adapter_named_twice_is_refused():
    model = tiny("llama")
    trained(model, gs.LoRA(r=4), "a")
    for verb in (gs.use, gs.merge):
        with pytest.raises(StateError, match="named twice"):
            verb(model, "a", "a")
