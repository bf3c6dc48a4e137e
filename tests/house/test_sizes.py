"""Files and functions small enough to read at one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house import tree

FILE_LINES = 400
METHOD_LINES = 200
FUNCTION_LINES = 60
EXCUSE = "Long because"
"""A longer function says so in its docstring or in a comment: "Long because ..."."""

WRITTEN = [path for room in ("src", "bench", "docs", "examples") for path in tree.files(".py", under=tree.ROOT / room)]


@pytest.mark.parametrize("path", WRITTEN, ids=tree.place)
def test_files(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    most = METHOD_LINES if path.parent.name == "methods" else FILE_LINES
    assert lines <= most, f"{tree.place(path)} has {lines} lines; at most {most}"


@pytest.mark.parametrize("path", WRITTEN, ids=tree.place)
def test_functions(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    faults = []
    for node in ast.walk(tree.parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            end = node.end_lineno or node.lineno
            long = end - node.lineno + 1 > FUNCTION_LINES
            if long and not any(EXCUSE in line for line in lines[max(0, node.lineno - 2) : end]):
                faults.append(
                    f"{node.name} (line {node.lineno}) has {end - node.lineno + 1} lines; at most {FUNCTION_LINES}"
                )
    assert not faults, f"{tree.place(path)}: " + "; ".join(faults)
