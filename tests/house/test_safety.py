"""What the library never does: run code from files, load pickles, trust a repository's own code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import tree

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "skops"}
RUNNERS = {"exec", "eval", "compile", "__import__"}
TORCH_FILES = {"torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.serialization.load"}
KEYWORDS = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True, "shell": False}
"""Keyword -> the only value it may be given; safest not to write it at all."""


def faults(path: Path) -> Iterator[str]:
    for node in ast.walk(tree.parsed(path)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            yield from (f"line {line}: imports {name}" for name in names if name.split(".")[0] in PICKLERS)
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{one.name}" for one in node.names]
                yield from (f"line {line}: imports {name}" for name in names if name in TORCH_FILES)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNNERS:
            yield f"line {line}: calls {node.func.id}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in TORCH_FILES:
            yield f"line {line}: uses {ast.unparse(node)}"
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is KEYWORDS[node.arg]):
                yield f"line {node.value.lineno}: {node.arg} is not {KEYWORDS[node.arg]}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and ast.unparse(value) != "False":
                    yield f"line {line}: trust_remote_code is not False"


@pytest.mark.parametrize("module", sorted(tree.modules()))
def test_no_code_from_files(module: str):
    found = [*faults(tree.modules()[module])]
    assert not found, f"{module}: " + "; ".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "torch.load(path)",
        "from torch import load",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_check_sees(line: str, tmp_path: Path):
    path = tmp_path / "bad.py"
    path.write_text(line)
    assert [*faults(path)]


@pytest.mark.parametrize(
    "line", ["model.eval()", "re.compile('x')", "torch.compile(model)", "f(trust_remote_code=False)"]
)
def test_the_check_lets_pass(line: str, tmp_path: Path):
    path = tmp_path / "good.py"
    path.write_text(line)
    assert not [*faults(path)]


def test_no_path_of_one_machine():
    """Whoever clones this has none of our folders."""
    private = re.compile(
        "|".join(rf"(?<![\w.]){re.escape('/' + name)}(?=[/\s'\"`:),]|$)" for name in ("work", "root", "tmp/team"))
    )
    found = []
    for path in tree.files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [tree.place(path, number) for number, line in enumerate(text.splitlines(), 1) if private.search(line)]
    assert not found
