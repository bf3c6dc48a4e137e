"""What fits and may still be a mistake: adapters that change nothing, and those that name another base."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM

import gossamer as gs
from gossamer.attachment.remarks import base_name, described
from gossamer.methods import METHODS, TargetedMethod
from tests.adapters import as_peft_writes, shaken, tokens
from tests.conformance.oracle import Toys

FIELDS: dict[str, dict[str, Any]] = {
    "vera": {"r": 3},
    "houlsby": {"bottleneck": 3},
    "lin": {"bottleneck": 3},
    "prefix": {"num_virtual_tokens": 2},
    "prompt": {"num_virtual_tokens": 2},
}
SPECS: dict[str, TargetedMethod] = {name: METHODS[name](**FIELDS.get(name, {})) for name in METHODS}
SPECS |= {"pissa": gs.LoRA(r=2, start="pissa"), "embedding": gs.LoRA(r=2, target_modules=("embed_tokens",))}
UNTOLD = ("dora", "bitfit", "norm", "full", "prefix", "prompt")
"""Whether these change something cannot be told without the base."""


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_idle_is_what_leaves_the_output_alone(name: str, toy: Toys):
    """Whoever says idle changes nothing; a start is idle for every method whose tensors can tell."""
    model = toy("gpt2" if name == "bitfit" else "llama")
    before = model(tokens()).logits
    gs.attach(model, SPECS[name])
    start = gs.capture(model)
    told = bool(start.idle_paths)
    assert told == (name not in UNTOLD)
    if told:
        assert set(start.idle_paths) == {path for path in start.paths if path}
        assert torch.allclose(model(tokens()).logits, before, atol=1e-5)
    shaken(model, "default")
    assert gs.capture(model).idle_paths == ()


def test_the_report_counts_them(toy: Toys):
    model = toy("llama")
    gs.attach(model, gs.LoRA(r=2))
    start = gs.capture(model)
    shaken(model, "default")
    moved = gs.capture(model)
    gs.detach(model)
    assert "changes nothing: its change is zero at all 14 modules" in str(gs.attach(model, start, "start"))
    half = {path: (start if index % 2 else moved).tensors[path] for index, path in enumerate(moved.paths)}
    assert "zero at 7 of 14 modules" in str(gs.attach(model, gs.Adapter(start.spec, half), "half"))
    assert gs.attach(model, moved, "moved").notes == ()


def test_an_idle_file_of_somebody_elses_is_said(toy: Toys, tmp_path: Path):
    model = toy("llama")
    gs.attach(model, gs.LoRA(r=2))
    folder = gs.capture(model).save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gs.Adapter.load(folder)
    with pytest.warns(UserWarning, match="changes nothing"):
        gs.Adapter.load(as_peft_writes(folder))


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("owner/one", "owner/other", True),
        ("owner/one", "/models/One", False),
        ("owner/one", "/home/x/models--owner--one/snapshots/0123", False),
        ("owner/one", "/home/x/models--owner--other/snapshots/0123", True),
        (None, "owner/one", False),
        ("owner/one", "", False),
    ],
)
def test_a_foreign_adapter_of_another_base(theirs: str | None, ours: str, said: bool, toy: Toys):
    model = toy("llama")
    gs.attach(model, gs.LoRA(r=2))
    shaken(model, "default")
    value = gs.capture(model)
    gs.detach(model)
    foreign = gs.Adapter(value.spec, value.tensors, None, {}, {"base_model_name_or_path": theirs})
    model.config._name_or_path = ours
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gs.attach(model, foreign)
    assert bool(seen) == said
    if said:
        assert "owner/one" in str(seen[0].message)


def test_a_snapshot_of_the_hub_is_called_by_its_id():
    assert base_name("/home/x/hub/models--owner--a-name/snapshots/0f3") == "owner/a-name"
    assert base_name("folder/base") == "folder/base"
    assert base_name(None) == ""


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "CAUSAL_LM"),
        ("gpt2", "CAUSAL_LM"),
        ("bert", None),
        ("t5", "SEQ_2_SEQ_LM"),
        ("whisper", None),
        ("clip", None),
        ("vit", None),
    ],
)
def test_pefts_own_loaders_know_the_class(name: str, task: str | None, toy: Toys):
    """By its task, or by the class itself where no task of PEFT's fits."""
    model = toy(name)
    said = described(model)
    assert said["task_type"] == task
    assert (said["auto_mapping"] is None) == (task is not None)
    if task is None:
        assert getattr(importlib.import_module(said["auto_mapping"]["parent_library"]), type(model).__name__)


@pytest.mark.parametrize(("name", "loader"), [("llama", AutoPeftModelForCausalLM), ("bert", AutoPeftModel)])
def test_pefts_own_loaders_open_it(name: str, loader: Any, toy: Toys, tmp_path: Path):
    toy(name).save_pretrained(tmp_path / "base")
    model = type(toy(name)).from_pretrained(tmp_path / "base").eval()
    gs.attach(model, gs.LoRA(r=2))
    shaken(model, "default")
    gs.capture(model).save(tmp_path / "adapter")
    with torch.no_grad():
        theirs = loader.from_pretrained(tmp_path / "adapter").eval()(input_ids=tokens()).logits
        assert torch.allclose(theirs, model(input_ids=tokens()).logits, atol=1e-5)
