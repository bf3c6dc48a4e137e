"""Every public module, class, function and method says what it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.house import tree

Function = ast.FunctionDef | ast.AsyncFunctionDef
FOREIGN = {"forward", "backward", "setup_context", "extra_repr"}
"""Methods whose meaning another library's base class fixes."""


@cache
def classes() -> dict[str, ast.ClassDef]:
    """Every class under src by its name."""
    return {
        node.name: node
        for path in tree.modules().values()
        for node in ast.walk(tree.parsed(path))
        if isinstance(node, ast.ClassDef)
    }


def base_names(node: ast.ClassDef) -> list[str]:
    """The last part of each base's name; subscripts are looked through."""
    plain = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return [
        base.attr if isinstance(base, ast.Attribute) else base.id
        for base in plain
        if isinstance(base, ast.Attribute | ast.Name)
    ]


def methods(node: ast.ClassDef) -> dict[str, Function]:
    """The functions in a class's own body."""
    return {one.name: one for one in node.body if isinstance(one, Function)}


def above(node: ast.ClassDef) -> list[ast.ClassDef]:
    """The classes of ours that a class derives from, and the protocols of ours that it fulfils by shape."""
    bases = [classes()[name] for name in base_names(node) if name in classes() and name != node.name]
    if "Protocol" in base_names(node):
        return bases
    protocols = [one for one in classes().values() if "Protocol" in base_names(one)]
    return bases + [one for one in protocols if methods(one) and set(methods(one)) <= set(methods(node))]


def inherits_words(node: ast.ClassDef, method: str) -> bool:
    """Whether a class above documents this method: an override need not repeat it."""
    owners = above(node)
    documented = any(method in methods(one) and ast.get_docstring(methods(one)[method]) for one in owners)
    return documented or any(inherits_words(one, method) for one in owners)


def undocumented(body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[str]:
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{owner.name}.{node.name}" if owner else node.name
        excused = bool(owner) and (node.name in FOREIGN or inherits_words(owner, node.name))
        if not ast.get_docstring(node) and not excused and not is_repeated(node):
            yield f"{name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, node)


def is_repeated(node: Function | ast.ClassDef) -> bool:
    """A setter or an overload: the words stand on its twin."""
    marks = [ast.unparse(mark) for mark in node.decorator_list]
    return any(mark.endswith((".setter", "overload")) for mark in marks)


@pytest.mark.parametrize("module", sorted(tree.modules()))
def test_every_public_name_is_documented(module: str):
    parsed = tree.parsed(tree.modules()[module])
    missing = ([] if ast.get_docstring(parsed) else ["the module itself"]) + [*undocumented(parsed.body)]
    assert not missing, f"{module}: no docstring on " + ", ".join(missing)
