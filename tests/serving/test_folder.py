"""A folder of adapters, and what its names were made to mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gossamer as gs
from gossamer.attachment import base_fingerprint
from gossamer.errors import AdapterFileError, DiskError, UsageError
from gossamer.files.places import adapter_of
from gossamer.models import tiny
from gossamer.serving import folder as module
from gossamer.serving import vllm
from gossamer.serving.folder import NAMES, Folder
from tests.adapters import trained


@pytest.fixture
def root(tmp_path: Path) -> Path:
    value = trained(tiny("llama"), gs.LoRA(r=2))
    for name in ("b", "a"):
        value.save(tmp_path / "adapters" / name)
    (tmp_path / "adapters" / "notes").mkdir()
    value.save(tmp_path / "outside")
    return tmp_path / "adapters"


def test_names_are_those_of_the_subfolders_until_they_are_changed(root: Path) -> None:
    one = Folder(root)
    assert one.adapters() == {"a": root / "a", "b": root / "b"}
    assert one.keep("c", root.resolve() / "a")
    assert one.keep("a", root.resolve() / "b")
    assert one.keep("b", None)
    assert {name: path.name for name, path in Folder(root).adapters().items()} == {"a": "b", "c": "a"}
    assert json.loads((root / NAMES).read_text()) == {"c": "a", "a": "b", "b": None}
    assert one.keep("a", root.resolve() / "a")
    assert one.keep("b", root.resolve() / "b")
    assert one.keep("c", None)
    assert json.loads((root / NAMES).read_text()) == {}, "only what differs from the subfolders"
    assert Folder(root).adapters() == {"a": root / "a", "b": root / "b"}


def test_only_what_lies_inside(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / NAMES).write_text(
        json.dumps({"x": "../outside", "y": "nothing", "z": "a", "v": str(root.parent / "outside")})
    )
    assert set(Folder(root).adapters()) == {"a", "b", "z"}
    assert [record.args for record in caplog.records] == [(name, NAMES) for name in ("x", "y", "v")]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {}}', '{"a": "b", "a": "b"}'])
def test_what_was_kept_cannot_be_read(root: Path, text: str) -> None:
    (root / NAMES).write_text(text)
    with pytest.raises(AdapterFileError):
        Folder(root).adapters()
    assert not Folder(root).keep("c", root.resolve() / "a"), "and it is not written over"
    assert (root / NAMES).read_text() == text


def test_a_folder_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DiskError("no room")

    monkeypatch.setattr(module, "write_json", full)
    assert not Folder(root).keep("c", root.resolve() / "a")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder of adapters"):
        Folder(tmp_path / "nothing").adapters()
    assert Folder(tmp_path / "nothing").inside("a") is None


def damaged(root: Path) -> dict[str, str]:
    """Subfolders that cannot be served, and a word of the reason for each."""
    value = trained(tiny("llama"), gs.LoRA(r=2))
    for name in (
        "pickle",
        "truncated",
        "longer",
        "no-config",
        "no-weights",
        "bad-json",
        ".hidden",
        "x.partial",
        "a\nb",
    ):
        value.save(root / name)
    (root / "pickle" / "adapter_model.safetensors").rename(root / "pickle" / "adapter_model.bin")
    for name, change in {"truncated": lambda data: data[:-8], "longer": lambda data: data + b"x"}.items():
        weights = root / name / "adapter_model.safetensors"
        weights.write_bytes(change(weights.read_bytes()))
    (root / "no-config" / "adapter_config.json").unlink()
    (root / "no-weights" / "adapter_model.safetensors").unlink()
    (root / "bad-json" / "adapter_config.json").write_text("{")
    value.save(root / "trainer" / "checkpoint-100")
    (root / "begun" / "checkpoints").mkdir(parents=True)
    (root / "step-5").mkdir()
    for name in ("adapter.safetensors", "state.json"):
        (root / "step-5" / name).write_text("{}")
    trained(tiny("qwen2"), gs.LoRA(r=2)).save(root / "misfit")
    return {
        "pickle": "pickle", "truncated": "whole safetensors", "longer": "whole safetensors", "no-config": "without",
        "no-weights": "no such file", "bad-json": "JSON", ".hidden": "dot", "x.partial": "interrupted",
        "a\nb": "control", "trainer": "checkpoint-100", "begun": "not finished", "step-5": "checkpoint of a run",
        "misfit": "another base",
    }  # fmt: skip


def test_what_cannot_be_served_is_told_and_not_listed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    reasons = damaged(root)
    found = Folder(root).found(base_fingerprint(tiny("llama")))
    assert set(found.adapters) == {"a", "b"}
    assert set(found.refused) == set(reasons), "an empty folder is nothing to tell of"
    lines = [record.getMessage() for record in caplog.records]
    for name, word in reasons.items():
        assert any(repr(name) in line and word in line for line in lines), (name, lines)
    assert not any("\n" in line for line in lines)


def test_a_folder_is_of_adapters_of_runs_or_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value = trained(tiny("llama"), gs.LoRA(r=2))
    run = tmp_path / "runs" / "sql"
    value.save(run / "adapter")
    (run / "config.yaml").write_text("base: x\n")
    assert Folder(tmp_path / "runs").adapters() == {"sql": run / "adapter"}
    assert Folder(run).adapters() == {"sql": run / "adapter"}
    assert Folder(run / "adapter").adapters() == {"adapter": run / "adapter"}
    assert adapter_of(run) == adapter_of(run / "adapter") == run / "adapter"
    one = Folder(run)
    assert one.inside("sql") == (run / "adapter").resolve()
    assert not one.keep("sql", None), "nothing is written into what was trained"
    value.save(tmp_path / "both" / "adapter")
    value.save(tmp_path / "both" / "other")
    assert set(Folder(tmp_path / "both").adapters()) == {"adapter", "other"}, "no run, though one is called so"
    (tmp_path / "empty").mkdir()
    caplog.clear()
    assert Folder(tmp_path / "empty").adapters() == {}
    assert "no adapter" in caplog.text


def test_vllm_is_told_the_same_names(root: Path) -> None:
    said: list[str] = []
    Folder(root).keep("c", root.resolve() / "a")
    Folder(root).keep("b", None)
    vllm.serve(str(root.parent), root, "127.0.0.1", 8000, dry_run=True, say=said.append)
    assert said[:2] == ["a: taken", "c: taken"]
    assert f"a={root.resolve() / 'a'}" in said[-1]
    assert f"c={root.resolve() / 'a'}" in said[-1]
