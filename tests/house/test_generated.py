"""Generated pages are fresh and links lead somewhere."""

from __future__ import annotations

from pathlib import Path

import build_pages
import pytest

from tests.house import tree


@pytest.mark.parametrize("page", build_pages.PAGES, ids=tree.place)
def test_fresh(page: Path):
    assert page.read_text(encoding="utf-8") == build_pages.PAGES[page](), "stale: run `make docs`"


def test_no_page_is_left_of_a_method_that_is_gone():
    assert not build_pages.orphans()


def test_links():
    assert not build_pages.broken_links()


def test_a_broken_link_is_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, `code`\n[good](#a-title-code) [bad](#none) [gone](missing.md) [web](https://example.org)\n"
    )
    assert len(build_pages.broken_links([page])) == 2
