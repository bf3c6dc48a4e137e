"""Every method's docstring has the parts that its page is made of, in one order, and each of its fields has words."""

from __future__ import annotations

import build_methods
import pytest

from gossamer.methods import METHODS, LoRA

every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_the_docstring_has_every_part(name: str):
    method = METHODS[name]
    assert "__doc__" in vars(method), "inherits its words"
    parts = build_methods.sections(method)
    assert [part for part in parts if part] == [*build_methods.SECTIONS], "one convention: see docs/build_methods.py"
    assert all(parts[part] for part in parts)
    first = build_methods.first_line(method)
    assert first.endswith("."), "the first line is a sentence of its own"
    assert "`" not in first


@every_method
def test_the_equation_stands_alone(name: str):
    equation = build_methods.markdown(build_methods.sections(METHODS[name])["Equation"])
    assert equation.startswith("```text\n"), "the equation is the indented paragraph under its word"


@every_method
def test_the_source_is_a_paper(name: str):
    source = build_methods.markdown(build_methods.sections(METHODS[name])["Source"])
    assert "](https://arxiv.org/abs/" in source


@every_method
def test_every_field_has_words(name: str):
    method = METHODS[name]
    mute = [field for field in build_methods.fields(method) if not build_methods.description(method, field)]
    assert not mute


def test_a_missing_part_is_seen():
    class Silent(LoRA):
        """One line.

        Equation:

            h = W x

        Merge: exact.
        """

    parts = build_methods.sections(Silent)
    assert parts == {"Equation": "    h = W x", "Merge": "exact."}
