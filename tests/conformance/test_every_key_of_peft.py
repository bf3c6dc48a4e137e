"""Every key that the pinned PEFT writes is read, kept because it says nothing of the tensors, or refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig

import gossamer as gs
from gossamer.errors import UnsupportedError
from gossamer.files.layouts import layout_of
from tests.adapters import as_peft_writes, trained
from tests.conformance.oracle import Toys

CONFIGS = (LoraConfig, IA3Config, VeraConfig, LNTuningConfig, PrefixTuningConfig, PromptTuningConfig)


def edited(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.fixture
def foreign(toy: Toys, tmp_path: Path) -> Path:
    return as_peft_writes(trained(toy("llama"), gs.LoRA(r=2, target_modules=("q_proj",))).save(tmp_path / "a"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_field_of_pefts_is_noticed(kind: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {*kind().to_dict()} - {"runtime_config"}
    layout = layout_of({"peft_type": kind().peft_type.value}, "")
    assert fields <= {*layout.known}


@pytest.mark.parametrize("key", ["corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"])
def test_what_matters_in_training_alone_is_kept(key: str, foreign: Path, tmp_path: Path):
    before = gs.Adapter.load(foreign)
    value = gs.Adapter.load(edited(foreign, **{key: {"any": 1}}))
    assert value == before
    assert json.loads((value.save(tmp_path / "b") / "adapter_config.json").read_text())[key] == {"any": 1}


@pytest.mark.parametrize("start", ["eva", "mica", "orthogonal"])
def test_starts_that_leave_the_base_alone(start: str, foreign: Path):
    before = gs.Adapter.load(foreign).named_tensors()
    assert gs.Adapter.load(edited(foreign, init_lora_weights=start)).named_tensors().keys() == before.keys()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of the future"])
def test_starts_that_change_the_base_are_refused(start: str, foreign: Path):
    with pytest.raises(UnsupportedError, match="initialisation changed"):
        gs.Adapter.load(edited(foreign, init_lora_weights=start))


@pytest.mark.parametrize("nothing", [None, False, {}, []])
@pytest.mark.parametrize("key", ["use_qa_lora", "lora_alfa", "something_new"])
def test_an_unknown_key_that_says_nothing(key: str, nothing: Any, foreign: Path):
    before = gs.Adapter.load(foreign)
    assert gs.Adapter.load(edited(foreign, **{key: nothing})) == before
