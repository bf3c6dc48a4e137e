"""Pictures are well-formed, say in words what they show, and never let text become markup."""

from __future__ import annotations

import math
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from gossamer.pages import charts

NASTY = '<script>"&'
PICTURES: dict[str, Callable[[], str]] = {
    "line": lambda: charts.line_chart({NASTY: [(0, 1), (1, 0.5), (2, math.nan), (3, 0.1)]}, NASTY, NASTY, NASTY),
    "line of nothing": lambda: charts.line_chart({"loss": []}, "loss"),
    "one point": lambda: charts.line_chart({"loss": [(1, 1)]}, "loss"),
    "bars": lambda: charts.bar_chart({NASTY: 3.0, "b": 0.0, "c": math.inf}, NASTY, NASTY),
    "heat": lambda: charts.heat_map([[3, 0], [1, 2]], [NASTY, "b"], [NASTY, "b"], NASTY, "true", "predicted"),
    "heat of zeros": lambda: charts.heat_map([[0]], ["a"], ["a"]),
    "panels": lambda: charts.small_multiples({NASTY: [[3, 2, 1], [2, 1, 0]], "k": [[1]]}, NASTY, NASTY, NASTY),
}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_well_formed_named_and_escaped(picture: Callable[[], str]):
    text = picture()
    root = ElementTree.fromstring(text)
    kinds = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert kinds[0] == "svg"
    assert "title" in kinds
    assert "desc" in kinds
    assert "script" not in kinds
    assert "nan" not in text.lower().replace(NASTY, "").partition("<desc")[0]
    assert text == picture(), "the same numbers draw the same picture"


def test_a_confusion_holds_every_count():
    text = charts.heat_map([[31, 4], [5, 62]], ["bad", "good"], ["bad", "good"], "confusion")
    shown = [element.text for element in ElementTree.fromstring(text).iter() if element.text]
    assert {"31", "4", "5", "62"} <= set(shown)
    with pytest.raises(ValueError, match="2 x 1"):
        charts.heat_map([[1, 2]], ["a", "b"], ["a"])


def test_tables_escape_and_align():
    text = charts.table(["name", "value"], [[NASTY, 0.123456], ["b", 12345]], "caption")
    assert "<script>" not in text
    assert 'class="number"' in text
    ElementTree.fromstring(text)


@pytest.mark.parametrize(
    ("value", "text"), [(3.0, "3"), (0.123456, "0.1235"), (1e-5, "1.00e-05"), (math.inf, "∞"), (12345, "12\u202f345")]
)
def test_numbers_as_a_person_writes_them(value: float, text: str):
    assert charts.number(value) == text
