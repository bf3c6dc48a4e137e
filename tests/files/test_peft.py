"""The adapter folder: what is written, what is kept, what is checked on the way back."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import gossamer as gs
from gossamer.errors import AdapterFileError, DiskError, StateError
from tests.adapters import as_peft_writes, same_bits, trained
from tests.conformance.oracle import Toys, config_of, tensors_of

SPEC = gs.LoRA(r=2, target_modules=("q_proj", "v_proj"), modules_to_save=("model.norm",), dropout=0.25)


@pytest.fixture
def adapter(toy: Toys) -> gs.Adapter:
    return trained(toy("llama"), SPEC)


def ours(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gossamer.json").read_text())


def test_the_layout(adapter: gs.Adapter, tmp_path: Path):
    folder = adapter.save(tmp_path / "deep" / "adapter")
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors", "gossamer.json"]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "gossamer"}
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["gossamer"]).keys() == {"base", "config", "tensors"}
    prefix = "base_model.model.model."
    layers = {
        f"{prefix}layers.{n}.self_attn.{p}.lora_{s}.weight" for n in (0, 1) for p in ("q_proj", "v_proj") for s in "AB"
    }
    assert tensors_of(folder).keys() == layers | {f"{prefix}norm.weight"}
    text = (folder / "adapter_config.json").read_text()
    assert [*json.loads(text)] == sorted(json.loads(text))
    assert (
        config_of(folder).items()
        >= {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["model.norm"],
            "lora_dropout": 0.25,
            "bias": "none",
            "use_rslora": False,
            "init_lora_weights": "gaussian",
            "inference_mode": True,
        }.items()
    )
    assert ours(folder).keys() == {"format", "gossamer", "digest", "spec", "base", "provenance"}
    assert ours(folder)["digest"] == adapter.digest
    assert ours(folder)["spec"] == SPEC.to_dict()
    assert ours(folder)["base"] == adapter.base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bit_equal_in_every_dtype(dtype: torch.dtype, adapter: gs.Adapter, tmp_path: Path):
    tensors = {path: {slot: t.to(dtype) for slot, t in slots.items()} for path, slots in adapter.tensors.items()}
    value = gs.Adapter(SPEC, tensors, adapter.base, {"by": ["me", 1, None]})
    loaded = gs.Adapter.load(value.save(tmp_path))
    assert loaded == value
    assert same_bits(loaded.named_tensors(), value.named_tensors())
    assert (loaded.spec, loaded.base, loaded.provenance) == (value.spec, value.base, value.provenance)


def test_all_linear_is_remembered(toy: Toys, tmp_path: Path):
    value = trained(toy("llama"), gs.LoRA(r=2))
    folder = value.save(tmp_path)
    assert len(config_of(folder)["target_modules"]) == 14
    assert gs.Adapter.load(folder).spec == gs.LoRA(r=2)
    again = gs.Adapter.load(folder).save(tmp_path / "again")
    assert config_of(again) == config_of(folder)


def test_tensors_that_share_memory(tmp_path: Path):
    """Parts of one buffer, or one tensor under two paths, are written like any other."""
    buffer = torch.randn(24, generator=torch.Generator().manual_seed(0))
    slots = {"lora_A": buffer[:8].view(2, 4), "lora_B": buffer[8:16].view(4, 2)}
    turned = {"lora_A": buffer[16:].view(4, 2).T, "lora_B": slots["lora_B"]}
    value = gs.Adapter(gs.LoRA(r=2, target_modules=("a", "b")), {"a": slots, "b": turned})
    assert gs.Adapter.load(value.save(tmp_path)) == value


def test_replacing_keeps_what_is_not_the_adapters(adapter: gs.Adapter, tmp_path: Path):
    """A README, a tokenizer, and PEFT's other adapters, which live in folders below this one."""
    adapter.save(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (2 * adapter_factors(adapter)).save(tmp_path / "other")
    (tmp_path / "other" / "deep").mkdir()
    (tmp_path / "other" / "deep" / "notes.txt").write_text("notes")
    changed = gs.Adapter(adapter.spec, adapter.tensors, None)
    changed.save(tmp_path)
    assert gs.Adapter.load(tmp_path).base is None
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "other" / "deep" / "notes.txt").read_text() == "notes"
    gs.Adapter.load(tmp_path / "other")


def adapter_factors(adapter: gs.Adapter) -> gs.Adapter:
    factors = {path: slots for path, slots in adapter.tensors.items() if "lora_A" in slots}
    return gs.Adapter(SPEC.replace(modules_to_save=()), factors)


def test_a_stale_description_does_not_survive_its_adapter(adapter: gs.Adapter, tmp_path: Path):
    adapter.save(tmp_path)
    adapter_factors(adapter).save(tmp_path)
    assert gs.Adapter.load(tmp_path) == adapter_factors(adapter)


def test_a_folder_that_is_not_an_adapters_is_not_touched(adapter: gs.Adapter, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StateError, match="not an adapter's"):
        adapter.save(tmp_path)
    file = tmp_path / "thesis.txt"
    with pytest.raises(StateError, match="not an adapter's"):
        adapter.save(file)
    assert file.read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_saving_where_one_stands(adapter: gs.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    try:
        adapter.save(".")
    except gs.GossamerError:
        assert os.listdir(tmp_path) == []
        return
    assert gs.Adapter.load(".") == adapter


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "open", "mkdir", "chmod"])
def test_a_full_disk_at_any_moment_leaves_the_old_adapter(
    call: str, adapter: gs.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One failing call at a time, from the first to the last: the old adapter stands, or the new one, whole."""
    folder = adapter.save(tmp_path / "adapter")
    newer = -adapter_factors(adapter)
    original: Callable[..., Any] = getattr(os, call)
    for moment in range(200):
        calls = iter(range(1000))

        def failing(*args: Any, moment: int = moment, calls: Any = calls, **options: Any) -> Any:
            if next(calls) == moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                newer.save(folder)
            except DiskError:
                failed = True
            else:
                failed = False
        assert gs.Adapter.load(folder) in (adapter, newer)
        if not failed and next(calls) <= moment:
            break
        adapter.save(folder)
    assert moment > 0, f"os.{call} is never called"
    assert gs.Adapter.load(folder) == newer


@pytest.mark.parametrize(
    ("file", "hint"), [("adapter_config.json", "adapter_model.safetensors"), ("adapter_model.safetensors", "")]
)
def test_a_missing_file(file: str, hint: str, adapter: gs.Adapter, tmp_path: Path):
    (adapter.save(tmp_path) / file).unlink()
    with pytest.raises(AdapterFileError) as caught:
        gs.Adapter.load(tmp_path)
    assert file in caught.value.where
    assert hint in caught.value.hint


def test_no_folder_at_all(tmp_path: Path):
    with pytest.raises(AdapterFileError, match="no such folder"):
        gs.Adapter.load(tmp_path / "absent")


def test_a_description_of_a_later_version_is_not_guessed_at(adapter: gs.Adapter, tmp_path: Path):
    folder = adapter.save(tmp_path)
    (folder / "gossamer.json").write_text(json.dumps(ours(folder) | {"format": 2}))
    with pytest.raises(gs.GossamerError, match="format"):
        gs.Adapter.load(folder)


def test_without_our_file_it_is_pefts_adapter(adapter: gs.Adapter, toy: Toys, tmp_path: Path):
    folder = adapter.save(tmp_path)
    (folder / "gossamer.json").unlink()
    loaded = gs.Adapter.load(folder)
    assert (loaded.base, dict(loaded.provenance)) == (adapter.base, {}), "the seal names the base"
    as_peft_writes(adapter.save(tmp_path))
    assert gs.Adapter.load(folder).base is None
    assert same_bits(loaded.named_tensors(), adapter.named_tensors())
    gs.attach(toy("llama"), loaded)
