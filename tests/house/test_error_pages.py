"""Every error has a page, every page an error, and they say the same."""

from __future__ import annotations

import re

import pytest

from gossamer import errors
from tests.house import tree
from tests.house.pages import blocks

FOLDER = tree.ROOT / "docs" / "errors"
KINDS = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.GossamerError)
}
SECTIONS = ("## What it means", "## Example", "## How to fix it")


def test_codes_are_unique():
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GossamerError)
    ]
    assert len(kinds) == len(KINDS)


def test_pages_and_codes_match():
    assert {path.stem for path in FOLDER.glob("*.md")} - {"index"} == set(KINDS)


@pytest.mark.parametrize("code", sorted(KINDS))
def test_page(code: str):
    kind, page = KINDS[code], FOLDER / f"{code}.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {code}\n")
    assert re.search(rf"`{kind.__name__}`.*exit code {kind.exit_code}\b", text), "name and exit code in one line"
    assert [one for one in SECTIONS if one in text] == [*SECTIONS]
    examples = [block.text for block in blocks(page) if block.text.startswith(f"{code}: ")]
    assert examples, "an example message as it is printed"
    for line in examples[0].splitlines()[1:]:
        assert re.match(r"  (- |where: |got: |expected: |hint: )|    ", line), f"not how a message is printed: {line!r}"


@pytest.mark.parametrize("code", sorted(KINDS))
def test_the_tree_at_the_top_of_errors_is_true(code: str):
    kind = KINDS[code]
    drawn = next(line for line in str(errors.__doc__).splitlines() if re.search(rf"\b{kind.__name__}\b", line))
    if kind not in (errors.GossamerError, errors.UsageError, errors.ArtefactError):
        assert code in drawn.split()
    exits = re.search(r"exit (\d+)", drawn)
    parent = kind.__mro__[1]
    assert kind.exit_code == (int(exits[1]) if exits else getattr(parent, "exit_code", None))
