"""What the documentation shows exists and runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import build_pages
import pytest
from ruamel.yaml import YAML

from gossamer.methods import TargetedMethod, method_from_dict
from tests.house import tree
from tests.house.pages import Block, blocks, commands, pages

README = tree.ROOT / "README.md"


def targets() -> set[str]:
    """The Makefile's targets."""
    return set(re.findall(r"^([a-z][a-z-]*):", (tree.ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def python(page: Path, *, slow: bool) -> list[Block]:
    """The Python blocks that a fast run, or a run with the real model, executes."""
    return [block for block in blocks(page) if block.language == "python" and (slow or not block.slow)]


def test_the_readme_shows_the_command_and_the_library():
    assert commands(README, "gossamer")
    assert any(one.startswith("make demo") for one in commands(README, "make"))
    assert [block for block in blocks(README) if block.language == "python"]


@pytest.mark.parametrize("page", pages(), ids=tree.place)
def test_commands_exist(page: Path):
    for line in commands(page, "gossamer"):
        verb = next((word for word in line.split()[1:2] if re.fullmatch(r"[a-z][a-z-]*", word)), None)
        if verb is None:
            continue  # `gossamer`, `gossamer --help`, `gossamer VERB`
        assert verb in build_pages.verbs(), f"{tree.place(page)}: {line!r}: no such verb"
        text = build_pages.help_of(verb)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", line):
            assert "." in flag or flag in text, f"{tree.place(page)}: {line!r}: `gossamer {verb}` has no {flag}"


@pytest.mark.parametrize("page", pages(), ids=tree.place)
def test_make_targets_exist(page: Path):
    for line in commands(page, "make"):
        for word in line.split("#")[0].split()[1:]:
            assert "=" in word or word in targets(), f"{tree.place(page)}: {line!r}: no such target"


def run_together(page: Path, chosen: list[Block]) -> dict[str, Any]:
    """Execute blocks one after another in one namespace, each at its own line numbers."""
    namespace = {"__name__": "__page__"}
    for block in chosen:
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
    return namespace


def yaml_specs(page: Path) -> list[TargetedMethod]:
    """The specs under `method:` in a page's YAML blocks, read as a run's config is."""
    configs = [YAML(typ="safe").load(block.text) for block in blocks(page) if block.language == "yaml"]
    return [method_from_dict(config["method"]) for config in configs if "method" in config]


@pytest.mark.parametrize("page", pages(), ids=tree.place)
def test_yaml_is_valid(page: Path):
    yaml_specs(page)


@pytest.mark.parametrize(
    "page", [page for page in pages() if page.exists() and python(page, slow=False)], ids=tree.place
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_together(page, python(page, slow=False))
    if page.parent.name == "methods":  # the same spec, said in Python and in YAML
        assert yaml_specs(page) == [namespace["spec"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in pages() if page.exists() and python(page, slow=True)], ids=tree.place
)
def test_python_runs_with_the_real_model(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not any(block.slow for block in python(page, slow=True)):
        return  # the fast run has executed all of it
    monkeypatch.chdir(tmp_path)
    run_together(page, python(page, slow=True))
