"""One type name, one meaning; and a type is abstract or final."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.house import tree
from tests.house.test_documented import Function, base_names, methods

CONSTANT = ast.Constant | ast.Tuple | ast.List | ast.Dict | ast.Name | ast.Attribute | ast.JoinedStr
"""What a default answer may return: a constant, an empty container, an argument or an attribute as it is."""


def declared(module: ast.Module) -> Iterator[tuple[str, int]]:
    """The public types that a module declares, classes and aliases, with their lines."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node.lineno
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[:1].isupper() and not name.isupper() and "TypeVar" not in ast.unparse(node.value):
                yield name, node.lineno


def test_one_name_one_meaning():
    found: dict[str, list[str]] = defaultdict(list)
    for path in tree.modules().values():
        for name, line in declared(tree.parsed(path)):
            found[name].append(tree.place(path, line))
    twice = {name: places for name, places in found.items() if len(places) > 1}
    assert not twice, "; ".join(f"{name} means {len(places)} things: {places}" for name, places in twice.items())


def every_class() -> dict[str, list[tuple[str, ast.ClassDef]]]:
    """Each class under src by its name, with the module that it stands in."""
    found: dict[str, list[tuple[str, ast.ClassDef]]] = defaultdict(list)
    for module, path in tree.modules().items():
        for node in ast.walk(tree.parsed(path)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append((module, node))
    return found


def above(node: ast.ClassDef, classes: dict[str, list[tuple[str, ast.ClassDef]]]) -> Iterator[ast.ClassDef]:
    """The classes of ours that a class derives from, near ones first."""
    for name in base_names(node):
        for _, owner in classes.get(name, ())[:1]:
            if owner is not node:
                yield owner
                yield from above(owner, classes)


def is_open(method: Function) -> bool:
    """Whether a method may be overridden: it is abstract, or a default answer that holds no logic.

    A default answer is a docstring and then nothing, one `return` of a constant or of what was given, or the refusal of
    a question that not every type answers.
    """
    if any(ast.unparse(mark).endswith(("abstractmethod", "overload")) for mark in method.decorator_list):
        return True
    body = method.body[1:] if ast.get_docstring(method) else method.body
    if not body or isinstance(body[0], ast.Pass):
        return True
    if len(body) > 1:
        return False
    (only,) = body
    if isinstance(only, ast.Return):
        return only.value is None or isinstance(only.value, CONSTANT)
    return isinstance(only, ast.Raise) or (isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant))


def overridden(node: ast.ClassDef, classes: dict[str, list[tuple[str, ast.ClassDef]]]) -> Iterator[str]:
    """The methods of a class that stand in for another's logic."""
    for name in methods(node):
        if name.startswith("__"):
            continue
        for owner in above(node, classes):
            if name in methods(owner) and not is_open(methods(owner)[name]):
                yield f"{node.name}.{name} overrides {owner.name}.{name}, which has logic of its own"


@pytest.mark.parametrize("module", sorted(tree.modules()))
def test_a_type_is_abstract_or_final(module: str):
    classes = every_class()
    mine = [node for found in classes.values() for where, node in found if where == module]
    faults = [fault for node in mine for fault in overridden(node, classes)]
    assert not faults, f"{module}: " + "; ".join(faults)


def test_a_fault_is_seen():
    module = ast.parse(
        "class A:\n"
        "    def answer(self):\n        return None\n"
        "    def work(self):\n        return self.answer() + 1\n"
        "class B(A):\n"
        "    def answer(self):\n        return 2\n"
        "    def work(self):\n        return 3\n"
    )
    classes = {node.name: [("m", node)] for node in module.body if isinstance(node, ast.ClassDef)}
    assert [*overridden(classes["B"][0][1], classes)] == ["B.work overrides A.work, which has logic of its own"]
