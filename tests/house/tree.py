"""What the house tests share: the repository's files, parsed sources, and the imports in them."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
SKIPPED = {"__pycache__", "build", "dist", "runs", "results", "site", "node_modules"}
HIDDEN_BUT_OURS = {".ci", ".github"}


@dataclass(frozen=True)
class Import:
    """One import statement's effect: `importer` needs `target`, a module of ours, and takes `name` from it."""

    importer: str
    target: str
    name: str
    line: int
    types_only: bool


def files(*suffixes: str, under: Path = ROOT) -> list[Path]:
    """Every file of the working tree with one of the suffixes (all files when none is given), caches left out."""
    found = []
    for folder, folders, names in os.walk(under):
        folders[:] = sorted(name for name in folders if is_ours_to_read(name))
        found += [Path(folder) / name for name in names if not suffixes or Path(name).suffix in suffixes]
    return sorted(found)


def is_ours_to_read(folder: str) -> bool:
    """Whether a folder belongs to the sources rather than to a cache, an environment or a run."""
    hidden = folder.startswith(".") and folder not in HIDDEN_BUT_OURS
    return not hidden and folder not in SKIPPED and not folder.endswith(".egg-info")


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module under src."""
    found = {}
    for path in files(".py", under=SOURCE):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str) -> Iterator[Import]:
    """Every import of one of our modules, at the top or inside a function, for types only or not."""
    tree = parsed(modules()[module])
    guarded = {id(inner) for node in ast.walk(tree) if is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        types_only = id(node) in guarded
        if isinstance(node, ast.Import):
            yield from (
                Import(module, one.name, "", node.lineno, types_only) for one in node.names if is_ours(one.name)
            )
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            for one in node.names:
                inner = f"{node.module}.{one.name}"
                target, name = (inner, "") if inner in modules() else (str(node.module), one.name)
                yield Import(module, target, name, node.lineno, types_only)


def is_for_types(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def is_ours(module: str) -> bool:
    """Whether a dotted name lies in the package."""
    return module.split(".")[0] == "gossamer"


def room(module: str) -> str:
    """The room a module lives in: `gossamer.files.peft` -> `files`; the package itself -> ``."""
    return [*module.split("."), ""][1]


def place(path: Path, line: int = 0) -> str:
    """`src/gossamer/spec.py:12`, for messages."""
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))
