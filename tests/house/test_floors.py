"""Imports go down only: each room may import the floors below it, and what `BESIDE` names on its own floor."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.house import tree

FLOORS = (
    {"errors", "families", "lazy", "moved", "peers", "spec", "adapter"},
    {"linalg", "pages", "progress", "kernels", "quant"},
    {"methods", "attachment", "data", "files"},
    {"models", "catalog", "running", "planning", "testing"},
    {"training", "merging", "serving", "analysis", "studies"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

BESIDE = {
    "kernels": {"linalg"},
    "spec": {"errors", "peers"},
    "adapter": {"errors", "spec"},
    "attachment": {"methods"},
    "files": {"methods", "attachment"},
    "models": {"catalog", "testing"},
    "testing": {"running"},
    "planning": {"models", "running"},
    "studies": {"training", "merging", "serving", "analysis"},
}

DOORS = {("gossamer.adapter", "gossamer.files.peft")}
"""The one way up: `Adapter.save` and `Adapter.load` open the file room, inside the function and not before."""

FACADE_NAMES = {"__version__"}
"""What the package's own `__init__` offers to rooms; anything else is imported from the room it lives in."""


def test_every_room_has_a_floor():
    homeless = {tree.room(module) for module in tree.modules()} - {*FLOOR_OF, ""}
    assert not homeless, f"no floor for {homeless}; add it to FLOORS and docs/house.md"


@pytest.mark.parametrize("module", sorted(tree.modules()))
def test_imports_go_down(module: str):
    if module == "gossamer":
        return  # the facade names every room, lazily; test_names holds it to that
    faults = [f"line {one.line}: imports {one.target}" for one in tree.imports(module) if not allowed(one)]
    assert not faults, f"{module}: " + "; ".join(faults)


def allowed(one: tree.Import) -> bool:
    here, there = tree.room(one.importer), tree.room(one.target)
    if not there:
        return one.name in FACADE_NAMES
    if here == there or (one.importer, one.target) in DOORS:
        return True
    return FLOOR_OF[there] < FLOOR_OF[here] or there in BESIDE.get(here, set())


@pytest.mark.parametrize(("importer", "target"), sorted(DOORS))
def test_doors_open_inside_functions_only(importer: str, target: str):
    used = {one.line for one in tree.imports(importer) if one.target == target}
    at_the_top = {
        node.lineno for node in tree.parsed(tree.modules()[importer]).body if isinstance(node, ast.ImportFrom)
    }
    assert used, f"the door {importer} -> {target} is not used any more: remove it"
    assert not used & at_the_top


def test_no_cycles():
    """Among the imports that run; two modules of one room may name each other's classes in annotations."""
    graph = {
        module: {one.target for one in tree.imports(module) if not one.types_only and (module, one.target) not in DOORS}
        for module in tree.modules()
        if module != "gossamer"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("module", sorted(tree.modules()))
def test_imports_by_name_go_down_too(module: str):
    """Text that names a module of ours ("gossamer.files.peft") may reach `importlib`, so it counts as an import."""
    if module == "gossamer":
        return
    texts = (node for node in ast.walk(tree.parsed(tree.modules()[module])) if isinstance(node, ast.Constant))
    named = {found[1] for node in texts if (found := re.match(r"gossamer\.(\w+)", str(node.value)))} & {*FLOOR_OF}
    here = tree.room(module)
    faults = {there for there in named if there != here and FLOOR_OF[there] >= FLOOR_OF[here]} - BESIDE.get(here, set())
    assert not faults, f"{module} names rooms above it: {faults}"
