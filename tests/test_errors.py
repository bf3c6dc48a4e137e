"""The exception tree: codes, exit codes, parts, and a trip between processes."""

from __future__ import annotations

import pickle
import re

import pytest

from gossamer import errors
from gossamer.errors import GossamerError, SpecError, nearest

EVERY = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GossamerError)]
EXIT_CODES = {"internal": 1, "usage": 2, "artefact": 3, "resources": 4, "disk": 5, "interrupted": 75}


def root_of(kind: type[GossamerError]) -> str:
    """The code of the ancestor just below GossamerError, which decides the exit code."""
    line = [one for one in kind.__mro__ if issubclass(one, GossamerError)]
    return (line[-2] if len(line) > 1 else line[0]).code


@pytest.mark.parametrize("kind", EVERY)
def test_exit_codes_follow_the_tree(kind: type[GossamerError]):
    assert kind.exit_code == EXIT_CODES[root_of(kind)]


def test_codes_are_distinct():
    codes = [kind.code for kind in EVERY]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("kind", EVERY)
def test_the_drawing_at_the_top_is_the_tree(kind: type[GossamerError]):
    (line,) = (line for line in str(errors.__doc__).splitlines() if re.search(rf"\b{kind.__name__} ", line))
    assert kind.code in line or f"exit {kind.exit_code}" in line


@pytest.mark.parametrize("kind", EVERY)
def test_parts_survive_a_trip_between_processes(kind: type[GossamerError]):
    parts = {"where": "a.yaml:3", "got": "x", "expected": "y", "hint": "did you mean 'z'?"}
    error = kind("it failed", **parts)
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert type(one) is kind
        assert one.parts() == {"code": kind.code, "what": "it failed"} | parts
        assert str(one).splitlines()[0] == f"{kind.code}: it failed"
        assert [line.split(":")[0].strip() for line in str(one).splitlines()[1:]] == [*parts]


def test_empty_parts_are_left_out():
    assert GossamerError("it failed").parts() == {"code": "internal", "what": "it failed"}
    assert str(GossamerError("it failed", got="x")) == "internal: it failed\n  got:      x"


def test_a_spec_error_lists_every_fault():
    error = pickle.loads(pickle.dumps(SpecError("two faults", faults=iter(["a: wrong", "b: missing"]))))
    assert error.faults == ("a: wrong", "b: missing")
    assert str(error) == "spec-invalid: two faults\n  - a: wrong\n  - b: missing"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q_porj", "did you mean 'q_proj' or 'v_proj'?"),
        ("nrom", "did you mean 'norm'?"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_nearest(name: str, expected: str):
    assert nearest(name, ["v_proj", "q_proj", "q_proj", "norm"]) == expected
