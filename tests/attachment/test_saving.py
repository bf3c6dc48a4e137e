"""transformers' own ways to save, while adapters are attached: they keep the adapter, or refuse."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import gossamer as gs
from gossamer.errors import StateError, UnsupportedError
from gossamer.quant import quantize_model
from tests.adapters import bits, same_bits, shaken, tokens, trained
from tests.conformance.oracle import Toys, logits

OURS = {"adapter_config.json", "adapter_model.safetensors", "gossamer.json"}


def test_save_pretrained_writes_the_adapter_and_no_base(toy: Toys, tmp_path: Path):
    model = toy("llama")
    value = trained(model, gs.LoRA(r=2), "sql")
    (tmp_path / "notes.txt").write_text("a checkpoint holds other things too")
    model.save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == OURS | {"notes.txt"}
    assert gs.Adapter.load(tmp_path) == value
    shaken(model, "sql")
    model.save_pretrained(str(tmp_path), state_dict=model.state_dict(), safe_serialization=True)
    assert gs.Adapter.load(tmp_path) == gs.capture(model, "sql") != value


def test_several_adapters_stand_in_folders_of_their_names(toy: Toys, tmp_path: Path):
    model = toy("llama")
    one, two = trained(model, gs.LoRA(r=2), "one"), trained(model, gs.LoRA(r=3), "two", seed=1)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    assert [gs.Adapter.load(tmp_path / name) for name in ("one", "two")] == [one, two]


def test_merged_it_writes_the_merged_weights(toy: Toys, tmp_path: Path):
    model = toy("llama")
    trained(model, gs.LoRA(r=2))
    gs.merge(model)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again, told = loaded
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again.eval()), logits(model))


def test_merged_beside_codes_is_refused(toy: Toys, tmp_path: Path):
    model = toy("llama")
    quantize_model(model, "nf4", ("lm_head",))
    trained(model, gs.LoRA(r=2))
    gs.merge(model)
    with pytest.raises(UnsupportedError, match="codes"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_publishing_is_refused(toy: Toys, tmp_path: Path):
    model = toy("llama")
    trained(model, gs.LoRA(r=2))
    for publish in (lambda: model.push_to_hub("me/x"), lambda: model.save_pretrained(tmp_path, push_to_hub=True)):
        with pytest.raises(StateError, match="not published"):
            publish()
    assert os.listdir(tmp_path) == []


def test_another_process_writes_nothing(toy: Toys, tmp_path: Path):
    model = toy("llama")
    trained(model, gs.LoRA(r=2))
    model.save_pretrained(tmp_path, is_main_process=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", ["detach", "merge for good"])
def test_without_adapters_the_model_saves_itself(how: str, toy: Toys, tmp_path: Path):
    model = toy("llama")
    trained(model, gs.LoRA(r=2))
    gs.detach(model) if how == "detach" else gs.merge(model, keep=False)
    assert not {"save_pretrained", "push_to_hub"} & set(vars(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_a_trainer_saves_the_adapter(toy: Toys, tmp_path: Path):
    model = toy("llama")
    value = trained(model, gs.LoRA(r=2))
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    Trainer(model=model, args=arguments).save_model()
    assert set(os.listdir(tmp_path / "run")) >= OURS
    assert "model.safetensors" not in os.listdir(tmp_path / "run")
    assert gs.Adapter.load(tmp_path / "run") == value


def test_a_copy_saves_its_own(toy: Toys, tmp_path: Path):
    model = toy("llama")
    value = trained(model, gs.LoRA(r=2))
    other = copy.deepcopy(model)
    shaken(other, "default", seed=5)
    other.save_pretrained(tmp_path)
    assert gs.Adapter.load(tmp_path) == gs.capture(other) != value
    assert gs.capture(model) == value


def test_a_state_dict_holds_the_adapter_and_a_plain_model_refuses_it(toy: Toys):
    model = toy("llama")
    trained(model, gs.LoRA(r=2))
    stored = model.state_dict()
    assert sum(".gossamer." in name for name in stored) == 28
    with pytest.raises(RuntimeError, match="gossamer"):
        toy("llama").load_state_dict(stored)
    gs.detach(model)
    assert same_bits(bits(model), bits(toy("llama")))
    assert model(tokens()).logits.isfinite().all()
