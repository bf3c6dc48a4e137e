"""Specs: strict values; every fault at once, with its place and the nearest right name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

import gossamer as gs
from gossamer.errors import SpecError
from gossamer.methods import METHODS, method_from_dict
from gossamer.spec import Spec, StrictBool, StrictFloat, StrictInt, StrictStr, read_yaml, write_yaml
from tests.laws.specs import SPECS


class Inner(Spec):
    rate: StrictFloat = 1.0
    steps: StrictInt = Field(default=1, ge=1)


class Outer(Spec):
    title: StrictStr
    inner: Inner = Inner()
    quick: StrictBool = False


def faults_of(text: str, folder: Path, spec: type[Spec] = Outer) -> tuple[str, ...]:
    """What reading a YAML file as a spec complains about; places without the folder."""
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    fields, lines = read_yaml(path)
    with pytest.raises(SpecError) as caught:
        spec.from_dict(fields, lines=lines)
    return tuple(fault.replace(f"{folder}/", "") for fault in caught.value.faults)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_a_dict_and_back(name: str, data: st.DataObject):
    spec = data.draw(SPECS[name])
    fields = spec.to_dict()
    assert fields["name"] == name
    assert method_from_dict(fields) == spec
    assert method_from_dict(fields).to_dict() == fields
    assert spec.replace() == spec


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_yaml_and_back(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    spec = data.draw(SPECS[name])
    path = tmp_path_factory.getbasetemp() / "spec.yaml"
    path.write_text(write_yaml(spec.to_dict()), encoding="utf-8")
    assert method_from_dict(read_yaml(path)[0]) == spec


def test_specs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        gs.LoRA().r = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_replace_validates():
    with pytest.raises(SpecError, match="greater than or equal to 1"):
        gs.LoRA().replace(r=0)
    with pytest.raises(SpecError, match="unknown key"):
        gs.LoRA().replace(rank=3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "r: Input should be greater than or equal to 1; got 0"),
        ({"r": 8.0}, "r: Input should be a valid integer; got 8.0"),
        ({"r": True}, "r: Input should be a valid integer; got True"),
        ({"r": "8"}, "r: Input should be a valid integer; got '8'"),
        ({"r": 10**9}, "r: Input should be less than or equal to 65536"),
        ({"alpha": float("inf")}, "alpha: Input should be a finite number"),
        ({"alpha": float("nan")}, "alpha: Input should be a finite number"),
        ({"alpha": True}, "alpha: Input should be a valid number; got True"),
        ({"alpha_pattern": {"q": float("inf")}}, "alpha_pattern.q: Input should be a finite number"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.q: Input should be greater than or equal to 1"),
        ({"rank_pattern": {"(": 1}}, "not a valid regular expression"),
        ({"target_modules": "q_proj("}, "not a valid regular expression"),
        ({"target_modules": 5}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1"),
        ({"dropout": -0.1}, "dropout: Input should be greater than or equal to 0"),
        ({"bias": "some"}, "bias: Input should be 'none', 'all' or 'lora_only'; got 'some'"),
        ({"scaling": "rs_lora"}, "scaling: Input should be 'standard' or 'rslora'"),
        ({"modules_to_save": "norm"}, "modules_to_save"),
        ({"layers_to_transform": True}, "layers_to_transform"),
        ({"lora_alpha": 3}, "lora_alpha: unknown key; did you mean 'alpha'?"),
        ({"target_module": ["q"]}, "target_module: unknown key; did you mean 'target_modules'"),
    ],
)
def test_wrong_values(fields: dict[str, Any], text: str):
    for make in (lambda: gs.LoRA(**fields), lambda: gs.LoRA.from_dict(fields), lambda: method_from_dict(fields)):
        with pytest.raises(SpecError) as caught:
            make()
        assert any(text in fault for fault in caught.value.faults)


def test_every_fault_at_once():
    with pytest.raises(SpecError) as caught:
        gs.LoRA(r=0, alpha="x", bias="some", rnk=3)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["r", "alpha", "bias", "rnk"]


def test_an_unknown_method():
    with pytest.raises(
        SpecError, match=r"method.name: unknown method; got 'lore', expected lora, .*; did you mean 'lora'"
    ):
        method_from_dict({"name": "lore"}, at=("method",))
    with pytest.raises(SpecError):
        method_from_dict({"name": None})


# Files ---------------------------------------------------------------------------------------------------------------


def test_faults_carry_line_and_column(tmp_path: Path):
    text = "titel: x\ninner:\n  rate: fast\n  steps: 0\n  rat: 1.0\nquick: no\n"
    assert faults_of(text, tmp_path) == (
        "c.yaml:1:1: title: required, but missing",
        "c.yaml:3:3: inner.rate: Input should be a valid number; got 'fast'",
        "c.yaml:4:3: inner.steps: Input should be greater than or equal to 1; got 0",
        "c.yaml:5:3: inner.rat: unknown key; did you mean 'rate'?",
        "c.yaml:6:1: quick: Input should be a valid boolean; got 'no'",
        "c.yaml:1:1: titel: unknown key; did you mean 'title'?",
    )


def test_places_inside_lists(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("r: 4\ntarget_modules:\n  - q_proj\n  - 3\n")
    fields, lines = read_yaml(path)
    with pytest.raises(SpecError, match=r"c\.yaml:4:5"):
        gs.LoRA.from_dict(fields, lines=lines)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", 1e-4),
        ("a: 1E5", 1e5),
        ("a: .5", 0.5),
        ("a: 0o17", 15),
        ("a: no", "no"),
        ("a: on", "on"),
        ("a: true", True),
        ("a: 'true'", "true"),
        ("a: 010", 10),
        ("a: 1:30", "1:30"),
        ("a: ~", None),
        ("a:", None),
        ("a: |\n  x\n  y\n", "x\ny\n"),
        ("\ufeffa: 1", 1),
        ("a: 1\r\n", 1),
        ("a: zwölf", "zwölf"),
        ("b: &x [1]\na: *x", [1]),
        ("b: &x {r: 8}\na:\n  <<: *x\n  q: 1", {"q": 1, "r": 8}),
    ],
)
def test_yaml_values(text: str, value: Any, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8", newline="")
    found = read_yaml(tmp_path / "c.yaml")[0]["a"]
    assert found == value
    assert type(found) is type(value)


BOMB = "a: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 6))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"a: 1\na: 2\n", ":2:1"),
        (b"a:\n\tb: 1\n", ":2:1"),
        (b"a: [1, 2\n", ":2:1"),
        (b"a: *nobody\n", ":1:4"),
        (b"- a\n- b\n", ""),
        (b"just text\n", ""),
        (b"", ""),
        (b"a: 1\n---\nb: 2\n", ":2:1"),
        (b"a: \xe9\n", ""),
        (b"\xff\xfea\x00:\x00 \x001\x00", ""),
        (b"a: \x00\n", ""),
        (b"a: !!python/object/apply:os.system ['exit']\n", ""),
        (b"a: !strange 3\n", ""),
        (b"a: &a [*a]\n", ""),
        (b"a: " + b"[" * 3000 + b"]" * 3000, ""),
        (b"a: " + b"1" * 5000 + b"\n", ""),
    ],
    ids=[
        "twice",
        "tab",
        "open",
        "alias",
        "list",
        "text",
        "empty",
        "documents",
        "latin-1",
        "utf-16",
        "nul",
        "python",
        "tag",
        "recursive",
        "deep",
        "huge",
    ],
)
def test_yaml_that_is_refused(content: bytes, place: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(SpecError) as caught:
        Outer.from_dict(read_yaml(tmp_path / "c.yaml")[0])
    assert f"c.yaml{place}" in str(caught.value) or not place


def test_a_small_file_that_unfolds_into_a_large_one(tmp_path: Path):
    """Aliases of aliases ("billion laughs"); one more level is nine times the memory, so this is the last that fits."""
    (tmp_path / "c.yaml").write_text(BOMB)
    with pytest.raises(SpecError):
        read_yaml(tmp_path / "c.yaml")


def test_a_file_that_is_not_there(tmp_path: Path):
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(SpecError, match="cannot read"):
            read_yaml(path)


PRINTED = st.text(st.characters(exclude_categories=("C", "Z")), max_size=8)


@given(st.dictionaries(PRINTED, st.integers() | st.floats(allow_nan=False) | PRINTED | st.none() | st.booleans()))
def test_what_is_written_reads_back(fields: dict[str, Any]):
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(write_yaml(fields), encoding="utf-8", newline="")
        assert read_yaml(path)[0] == fields
