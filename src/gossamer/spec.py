"""Frozen, strict specs, and how they are read from Python, dicts and YAML files.

A spec is a value: it is checked once, when it is made, and never changes. Unknown keys, wrong types and values out of
range are errors; all faults of one input are reported together, each with its place and the nearest right name.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the YAML reader names no types)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError
from pydantic_core import PydanticCustomError

from gossamer.errors import SpecError, nearest
from gossamer.peers import OURS

StrictInt = Annotated[int, Strict()]
StrictFloat = Annotated[float, Strict()]
StrictBool = Annotated[bool, Strict()]
StrictStr = Annotated[str, Strict()]


_MOST_KEYS = 10_000


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | set | frozenset) else value


Names = Annotated[tuple[StrictStr, ...], BeforeValidator(_as_tuple)]
Indices = Annotated[tuple[StrictInt, ...], BeforeValidator(_as_tuple)]


class _Teaching(type(BaseModel)):  # pydantic's metaclass, by its public handle
    """Turns pydantic's report into ours at construction from Python; nested validation keeps pydantic's own path."""

    def __call__(cls: Any, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **cls.given(fields))
        except ValidationError as error:
            raise SpecError(f"{cls.__name__} is not valid", faults=_faults(cls, error)) from None


class Spec(BaseModel, metaclass=_Teaching):
    """Base of every spec and config: frozen, strict, comparable, and a plain dict away from JSON or YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back to an equal value."""
        return self.heading() | self.model_dump(mode="json")

    def heading(self) -> dict[str, Any]:
        """What `to_dict` says before the fields."""
        return {}

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], *, where: str = "", lines: Lines | None = None, at: tuple[str, ...] = ()
    ) -> Self:
        """Validate a mapping. Raises `SpecError` with every fault.

        Args:
            where: what the mapping is called in the error.
            lines: positions of the file it came from (see `read_yaml`), added to each fault.
            at: the keys that lead to this mapping in that file.
        """
        try:
            return cls.model_validate(dict(fields), context={"lines": lines})
        except ValidationError as error:
            raise SpecError(f"{where or cls.__name__} is not valid", faults=_faults(cls, error, lines, at)) from None

    @classmethod
    def given(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields that keywords of a call from Python mean; a file's keys are taken as they are."""
        return fields

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


@dataclass(frozen=True)
class Lines:
    """Where each key of a YAML file stands: `at(("train", "lr"))` -> `"config.yaml:7:3"`."""

    file: str
    positions: Mapping[tuple[str | int, ...], tuple[int, int]]
    elsewhere: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)
    """Keys that were put in from somewhere else, with all that is below them -> that place, such as a flag."""

    def put(self, path: tuple[str | int, ...], place: str) -> Lines:
        """The same with one key that stands at `place`."""
        return replace(self, elsewhere={path: place, **self.elsewhere})

    def at(self, path: tuple[str | int, ...]) -> str:
        """The position of `path`, or of its nearest ancestor that the file holds."""
        for keys, place in self.elsewhere.items():
            if path[: len(keys)] == keys:
                return place
        while path and path not in self.positions:
            path = path[:-1]
        line, column = self.positions.get(path, (0, 0))
        return f"{self.file}:{line + 1}:{column + 1}"


def nested(error: SpecError) -> PydanticCustomError:
    """The faults of a spec inside another, to be raised in its validation, so that all are reported together."""
    return PydanticCustomError("nested", "is not valid", {"faults": [*error.faults]})


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """Read a YAML mapping together with the position of every key. Raises `SpecError` with file:line:column."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}", got=str(error)) from None
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise SpecError("not valid YAML", where=where, got=str(error.problem)) from None
    except (YAMLError, ValueError, RecursionError) as error:  # numbers and nestings that Python itself gives up on
        raise SpecError("not valid YAML", where=str(path), got=str(error)) from None
    if not isinstance(tree, dict):
        raise SpecError("a config is a mapping of keys to values", where=str(path), got=type(tree).__name__)
    positions: dict[tuple[str | int, ...], tuple[int, int]] = {}
    return _plain(tree, (), positions), Lines(str(path), positions)


def _plain(node: Any, path: tuple[str | int, ...], positions: dict[tuple[str | int, ...], tuple[int, int]]) -> Any:
    """Strip the YAML reader's own types and note where each key stands."""
    marks: Any = getattr(node, "lc", None)
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag:
        raise SpecError("a config holds plain values, without YAML tags", got=str(tag))
    if len(positions) > _MOST_KEYS:  # aliases of aliases can make a kilobyte of text into billions of keys
        raise SpecError("a config of more keys than any config has", expected=f"at most {_MOST_KEYS:,}")
    if isinstance(node, dict):
        for key in node:
            # a key merged in by "<<" stands elsewhere: its mapping's own place will do
            positions[(*path, key)] = tuple(marks.key(key)) if key in marks.data else (marks.line, marks.col)
        return {str(key): _plain(value, (*path, key), positions) for key, value in node.items()}
    if isinstance(node, list):
        for index in range(len(node)):
            positions[(*path, index)] = tuple(marks.item(index))
        return [_plain(value, (*path, index), positions) for index, value in enumerate(node)]
    for plain in (bool, int, float, str):
        if isinstance(node, plain):
            return plain(node)
    return node


def write_yaml(fields: Mapping[str, Any]) -> str:
    """YAML text of a plain mapping, in the order given."""
    from io import StringIO

    from ruamel.yaml import YAML

    out = StringIO()
    YAML().dump(dict(fields), out)
    return out.getvalue()


def _faults(
    cls: type[BaseModel], error: ValidationError, lines: Lines | None = None, at: tuple[str, ...] = ()
) -> list[str]:
    """One readable line for each of pydantic's errors."""
    found: list[str] = []
    for fault in error.errors():
        if fault["type"] == "nested":
            found += fault.get("ctx", {})["faults"]
            continue
        path = tuple(part for part in fault["loc"] if not (isinstance(part, str) and part.startswith("function-")))
        dotted = ".".join(str(part) for part in (*at, *path))
        place = f"{lines.at((*at, *path))}: " if lines else ""
        if fault["type"] == "extra_forbidden":
            hint = _right_key(cls, path, at)
            found.append(f"{place}{dotted}: unknown key{'; ' + hint if hint else ''}")
        elif fault["type"] == "missing":
            found.append(f"{place}{dotted}: required, but missing")
        else:
            found.append(f"{place}{dotted}: {fault['msg']}; got {fault['input']!r}")
    return list(dict.fromkeys(found))


def _right_key(cls: type[BaseModel], path: tuple[str | int, ...], at: tuple[str, ...]) -> str:
    """A hint for an unknown key: ours for another tool's, where it belongs, or the nearest name; `""` if none is meant.

    A key that has a place elsewhere gets no name that is only spelt alike.
    """
    name, names = str(path[-1]), _names_at(cls, path[:-1])
    inside = [f"{outer}.{name}" for outer in cls.model_fields if name in _names_at(cls, (outer,))]
    ours = inside[0] if inside else OURS.get(name.lower().replace("-", "_"))
    if ours is None:
        return nearest(name, names)
    setting = ours.rpartition(".")[2]
    if setting.partition(":")[0] in names:
        return f"did you mean {setting!r}?"
    room = ours.partition(":")[0].partition(".")[0]
    return f"did you mean {ours!r}?" if at or room in cls.model_fields else ""


def _names_at(cls: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The field names of the (possibly nested) spec that `path` leads to."""
    for part in path:
        field = cls.model_fields.get(str(part))
        nested = field.annotation if field else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            return []
        cls = nested
    return list(cls.model_fields)
