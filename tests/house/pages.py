"""The documentation as data: pages, fenced blocks, the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.house.tree import ROOT, files

SLOW = "<!-- slow -->"
"""On the line before a fence: this block needs the real model, so only `make test-all` runs it."""

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `line` is the number of its first line of text."""

    language: str
    text: str
    line: int
    slow: bool


@cache
def pages() -> tuple[Path, ...]:
    """README, CONTRIBUTING and everything under docs."""
    return (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *files(".md", under=ROOT / "docs"))


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, in order. Fails on one that is never closed."""
    found: list[Block] = []
    opened, body, previous = None, [], ""
    start, slow = 0, False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, body, start, slow = fence, [], number + 1, previous.strip() == SLOW
        elif opened is not None and line.strip() == opened["fence"]:
            found.append(Block(opened["language"], "\n".join(body) + "\n", start, slow))
            opened = None
        elif opened is not None:
            body.append(line.removeprefix(opened["indent"]))
        previous = line or previous
    assert opened is None, f"{page}: a block that begins at line {start - 1} is not closed"
    return tuple(found)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        for number in range(block.line - 2, block.line + block.text.count("\n")):
            lines[number] = ""
    return "\n".join(lines)


def commands(page: Path, program: str) -> list[str]:
    """Every command line of a page that calls `program`: in code spans and in blocks that are not Python."""
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    shell = "\n".join(block.text for block in blocks(page) if block.language in ("", "bash", "sh", "console", "text"))
    lines = [re.sub(r"^\s*(\$ )?(\.venv/bin/)?|\s+#.*$", "", line) for line in shell.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in [*spans, *lines] for part in re.split(r"&&|;|\|", line)]
    return [part for part in parts if part == program or part.startswith(f"{program} ")]
