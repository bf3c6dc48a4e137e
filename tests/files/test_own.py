"""Methods that PEFT does not have, or that ask for more than it can say: our own type in the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import gossamer as gs
from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.methods import METHODS, TargetedMethod
from tests.adapters import trained
from tests.conformance.oracle import Toys, config_of, logits, tensors_of

SPECS: dict[str, tuple[str, TargetedMethod]] = {
    "GOSSAMER_BITFIT": ("gpt2", METHODS["bitfit"]()),
    "GOSSAMER_HOULSBY": ("llama", METHODS["houlsby"](bottleneck=4, modules_to_save=("norm",))),
    "GOSSAMER_LIN": ("gpt2", METHODS["lin"](bottleneck=4)),
    "GOSSAMER_FULL": ("llama", METHODS["full"]()),
    "GOSSAMER_IA3": ("llama", METHODS["ia3"](trainable_tokens=(5, 6))),
    "GOSSAMER_PROMPT": ("llama", METHODS["prompt"](num_virtual_tokens=2, trainable_tokens=(5, 6))),
    "GOSSAMER_VERA": ("llama", METHODS["vera"](r=4, trainable_tokens={"embed_tokens": (5, 6)})),
}


@pytest.mark.parametrize("kind", SPECS)
def test_written_and_read(kind: str, toy: Toys, tmp_path: Path):
    name, spec = SPECS[kind]
    model = toy(name)
    adapter = trained(model, spec)
    loaded = gs.Adapter.load(adapter.save(tmp_path))
    assert config_of(tmp_path)["peft_type"] == kind
    assert loaded == adapter
    assert loaded.spec == spec
    assert {path: [*slots] for path, slots in loaded.tensors.items()} == {
        path: [*slots] for path, slots in adapter.tensors.items()
    }
    assert tensors_of(tmp_path).keys() == {
        f"base_model.model.{path}.{slot}" for path, slots in adapter.tensors.items() for slot in slots
    }
    other = toy(name)
    gs.attach(other, loaded)
    assert torch.equal(logits(other), logits(model))
    assert gs.Adapter.load(loaded.save(tmp_path)) == adapter


def test_peft_refuses_it(toy: Toys, tmp_path: Path):
    trained(toy("gpt2"), METHODS["bitfit"]()).save(tmp_path)
    with pytest.raises((KeyError, ValueError), match="GOSSAMER_BITFIT"):
        PeftModel.from_pretrained(toy("gpt2"), str(tmp_path))


def test_without_our_description_there_is_no_spec(toy: Toys, tmp_path: Path):
    trained(toy("gpt2"), METHODS["bitfit"]()).save(tmp_path)
    (tmp_path / "gossamer.json").unlink()
    with pytest.raises(AdapterFileError, match=r"gossamer\.json, which is missing"):
        gs.Adapter.load(tmp_path)


@pytest.mark.parametrize("kind", ["GOSSAMER_NOTHING", "GOSSAMER_", "gossamer_bitfit", "ADALORA", "TRAINABLE_TOKENS"])
def test_types_that_are_not_covered(kind: str, toy: Toys, tmp_path: Path):
    trained(toy("gpt2"), METHODS["bitfit"]()).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
    with pytest.raises(UnsupportedError, match=kind):
        gs.Adapter.load(tmp_path)
