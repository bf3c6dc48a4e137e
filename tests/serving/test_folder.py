"""A folder of adapters, and what its names were made to mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gossamer as gs
from gossamer.errors import AdapterFileError, DiskError, UsageError
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


def test_vllm_is_told_the_same_names(root: Path) -> None:
    said: list[str] = []
    Folder(root).keep("c", root.resolve() / "a")
    Folder(root).keep("b", None)
    vllm.serve(str(root.parent), root, "127.0.0.1", 8000, dry_run=True, say=said.append)
    assert said[:2] == ["a: taken", "c: taken"]
    assert f"a={root.resolve() / 'a'}" in said[-1]
    assert f"c={root.resolve() / 'a'}" in said[-1]
