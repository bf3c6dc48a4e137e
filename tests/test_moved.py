"""Modules that moved answer to their earlier names."""

from __future__ import annotations

import ast
import importlib
import sys

import pytest

from gossamer.moved import MOVED, RENAMED
from tests.house import tree


@pytest.mark.parametrize("earlier", sorted(MOVED))
def test_a_moved_module_is_the_same_module(earlier: str):
    now = importlib.import_module(f"gossamer.{MOVED[earlier]}")
    sys.modules.pop(f"gossamer.{earlier}", None)
    with pytest.warns(DeprecationWarning, match=f"gossamer.{MOVED[earlier]}"):
        assert importlib.import_module(f"gossamer.{earlier}") is now
    for old, new in RENAMED.get(earlier, {}).items():
        assert getattr(now, old) is getattr(now, new)


@pytest.mark.parametrize("earlier", sorted({*RENAMED} & {*MOVED}))
def test_an_earlier_name_hides_none_that_the_module_uses(earlier: str):
    parsed = tree.parsed(tree.modules()[f"gossamer.{MOVED[earlier]}"])
    used = {node.id for node in ast.walk(parsed) if isinstance(node, ast.Name)}
    assert not used & {*RENAMED[earlier]}


def test_a_renamed_class_answers_in_the_package_it_stayed_in():
    with pytest.warns(DeprecationWarning, match=r"gossamer\.serving\.Sequence"):
        from gossamer.serving import Request
    from gossamer.serving import Sequence

    assert Request is Sequence
    assert isinstance(Request((1, 2)), Sequence)


def test_other_names_are_still_missing():
    with pytest.raises(AttributeError, match="Requests"):
        importlib.import_module("gossamer.serving").Requests  # noqa: B018


def test_other_modules_are_still_missing():
    with pytest.raises(ModuleNotFoundError, match=r"gossamer\.nowhere"):
        importlib.import_module("gossamer.nowhere")
