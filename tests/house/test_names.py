"""The public names: the lazy table, what type checkers see, and the rooms agree."""

from __future__ import annotations

import ast
import importlib
import types

import pytest

import gossamer
from tests.house import tree

LAZY = dict(gossamer._HOME)

SURFACE = {
    "adapter": ("Adapter",),
    "analysis": ("inspect", "plan"),
    "attachment": ("attach", "capture", "detach", "merge", "unmerge", "use", "using"),
    "errors": ("GossamerError",),
    "merging": ("combine", "extract", "merge_into_base"),
    "methods": ("DoRA", "LoRA"),
    "models": ("fetch", "load_base"),
    "serving": ("Engine", "generate"),
    "training": ("RunConfig", "TrainConfig", "evaluate", "train"),
}
"""Promised names by room. One that its room offers must be public; the design allows the rest to come later."""

NOW = {
    "Adapter",
    "LoRA",
    "TrainConfig",
    "attach",
    "capture",
    "detach",
    "fetch",
    "load_base",
    "merge",
    "train",
    "unmerge",
    "use",
    "using",
}


def test_all_is_the_lazy_table():
    assert list(gossamer.__all__) == [*LAZY, "__version__"]
    assert list(LAZY) == sorted(LAZY)
    assert dir(gossamer) == sorted(gossamer.__all__)


def test_type_checkers_see_the_same_names():
    seen = {}
    module = tree.parsed(tree.modules()["gossamer"])
    for node in (one for guard in module.body if tree.is_for_types(guard) for one in ast.walk(guard)):
        if isinstance(node, ast.ImportFrom) and tree.is_ours(str(node.module)):
            for one in node.names:
                assert one.name == one.asname, (
                    f"re-export {one.name} as itself, so that type checkers count it as public"
                )
                seen[one.name] = str(node.module).removeprefix("gossamer.")
    assert seen == LAZY


@pytest.mark.parametrize("name", sorted(LAZY))
def test_each_name_is_importable(name: str):
    value = getattr(gossamer, name)
    home = importlib.import_module(f"gossamer.{LAZY[name]}")
    assert value is getattr(home, name)
    assert not isinstance(value, types.ModuleType), "a public name is a class or a function, never a room"
    assert value.__doc__, f"gs.{name} has no docstring"


@pytest.mark.parametrize("room", sorted({*LAZY.values()} - {"adapter", "errors"}))
def test_rooms_list_what_the_package_exports(room: str):
    home = importlib.import_module(f"gossamer.{room}")
    assert {name for name, where in LAZY.items() if where == room} <= set(getattr(home, "__all__", ()))


@pytest.mark.parametrize("room", sorted({tree.room(module) for module in tree.modules()} & {*SURFACE}))
def test_promised_names_that_exist_are_public(room: str):
    home = importlib.import_module(f"gossamer.{room}")
    hidden = [name for name in SURFACE[room] if hasattr(home, name) and LAZY.get(name) != room]
    assert not hidden, f"gossamer.{room} offers {hidden}, but `import gossamer` does not"


def test_the_names_everybody_needs_are_there():
    assert set(gossamer.__all__) >= NOW, NOW - set(gossamer.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        _ = gossamer.lora  # pyright: ignore[reportAttributeAccessIssue]


def test_version_is_the_packages():
    import tomllib

    project = tomllib.loads((tree.ROOT / "pyproject.toml").read_text())["project"]
    assert gossamer.__version__ == project["version"]


@pytest.mark.parametrize("name", ["CATALOG", "data_file", "fetch", "home", "load_base", "tiny", "write_model_folder"])
def test_models_offers_what_its_lazy_table_names(name: str):
    models = importlib.import_module("gossamer.models")
    assert name in models.__all__
    assert getattr(models, name) is getattr(importlib.import_module(f"gossamer.{models._HOME[name]}"), name)
