"""The turns of a chat, as files write them: OpenAI's `role` and `content`, ShareGPT's `from` and `value`.

A field of a turn is read, or empty, or the row is refused: nothing that a turn says is lost. Contents in parts are
joined if all parts are text. An empty system turn says nothing and is left out; `developer` is OpenAI's newer word for
`system`. Calls of tools and their results keep OpenAI's shape, which chat templates read; a call's arguments become an
object, because templates write objects as JSON and would quote a JSON text twice.
"""

import json
from collections.abc import Mapping
from typing import Any

from gossamer.data.columns import is_empty
from gossamer.data.containers import kind_of
from gossamer.data.rows import Turn
from gossamer.errors import nearest

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IDLE_FIELDS = ("id", "created", "created_at", "timestamp", "model", "finish_reason", "logprobs", "status")
"""Fields of logged turns that say nothing about what is to be learned."""


class BadRow(ValueError):
    """The reason why a row cannot be used."""


class Fields:
    """A record whose fields are asked for by name and type. A null field is an absent one, as Parquet writes it."""

    def __init__(self, record: Any, label: str = "") -> None:
        if not isinstance(record, Mapping):
            raise BadRow(f"{label}must be an object, got {kind_of(record)}")
        self.given = {name: value for name, value in record.items() if value is not None}
        self.null = set(record) - set(self.given)
        self.label = label

    def text(self, name: str, *, optional: bool = False) -> str:
        """A field that holds text which a tokenizer can take; empty only where it is optional."""
        if name not in self.given:
            if optional:
                return ""
            found = "is null" if name in self.null else f"is missing; found {', '.join(self.given) or 'no fields'}"
            raise BadRow(f"{self.label}{name!r} {found}")
        value = self.given[name]
        if not isinstance(value, str):
            raise BadRow(f"{self.label}{name!r} must be text, got {kind_of(value)}")
        if not optional and not value.strip():
            raise BadRow(f"{self.label}{name!r} is empty")
        if "\0" in value:
            raise BadRow(f"{self.label}{name!r} holds a NUL character at position {value.index(chr(0))}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"{self.label}{name!r} holds half a surrogate pair at position {error.start}") from None
        return value

    def turns(self, name: str) -> list[Any]:
        """A field that holds a list of turns."""
        if name not in self.given:
            return [self.text(name)]  # says that it is missing, or null
        value = self.given[name]
        if not isinstance(value, list) or not value:
            raise BadRow(f"{name!r} must be a list of turns, got {kind_of(value) if value != [] else 'an empty list'}")
        return value

    def one_of(self, names: tuple[str, ...]) -> str:
        """The one of these names whose field is filled; `""` for none."""
        filled = [name for name in names if not is_empty(self.given.get(name))]
        if len(filled) > 1:
            raise BadRow(f"{self.label}{' and '.join(map(repr, filled))} mean the same; only one may be filled")
        return filled[0] if filled else ""

    def parsed(self, name: str) -> Any:
        """A field that holds a list or an object, or the JSON text of one, as CSV cells do."""
        value = self.given[name]
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{self.label}{name!r} must be a list, or the JSON text of one; got {value!r:.40}") from None


def read_turns(entries: list[Any], role_field: str = "role", text_field: str = "content") -> tuple[Turn, ...]:
    """The turns of a list. Raises `BadRow` with the number of the turn that is at fault."""
    turns: list[Turn] = []
    called = False
    for number, entry in enumerate(entries, start=1):
        turn = _turn(Fields(entry, f"turn {number}: "), role_field, text_field, called)
        called = called or bool(turn.calls)
        if turn.role != "system" or turn.text.strip():
            turns.append(turn)
    return tuple(turns)


def _turn(entry: Fields, role_field: str, text_field: str, called: bool) -> Turn:
    openai = role_field == "role"
    role = _role(entry, role_field, called)
    extra = (["name", "tool_call_id"] if openai else []) + (["tool_calls"] if openai and role == "assistant" else [])
    known = {role_field, text_field, "weight", "train", *extra, *_IDLE_FIELDS}
    if lost := sorted(name for name in set(entry.given) - known if not is_empty(entry.given[name])):
        reads = f"{role_field!r}, {text_field!r}, 'weight' and 'train'"
        raise BadRow(f"{entry.label}{', '.join(map(repr, lost))} would be lost; a turn has {reads}")
    switches = {name: entry.given[name] for name in ("weight", "train") if name in entry.given}
    if wrong := [name for name, value in switches.items() if value not in (0, 1)]:  # false and true are 0 and 1
        raise BadRow(f"{entry.label}{wrong[0]!r} must be 0 or 1, got {kind_of(switches[wrong[0]])}")
    if role != "assistant" and any(switches.values()):
        raise BadRow(f"{entry.label}only assistant turns are learned, but this {role} turn asks for it")
    fields = {name: entry.text(name) for name in extra if name != "tool_calls" and not is_empty(entry.given.get(name))}
    calls = entry.given.get("tool_calls") if "tool_calls" in extra else None
    given = fields | ({"tool_calls": _calls(calls, entry.label)} if calls else {})
    silent = role == "system" or "tool_calls" in given
    text = _content(entry, text_field, optional=silent)
    return Turn(role, text, role == "assistant" and all(switches.values()), tuple(given.items()))


def _role(entry: Fields, field: str, called: bool) -> str:
    role = entry.text(field)
    role = {"developer": "system"}.get(role, _SHAREGPT_ROLES.get(role, role) if field == "from" else role)
    if role in ROLES or (role == "tool" and field == "role" and called):
        return role
    hint = nearest(role, (*ROLES, *_SHAREGPT_ROLES) if field == "from" else ROLES)
    if role in ("tool", "function", "function_call", "observation", "tool_call", "tool_response"):
        hint = "calls and results are read as OpenAI writes them: tool_calls of an assistant turn, then role tool"
    raise BadRow(f"{entry.label}unknown role {role!r}{'; ' + hint if hint else ''} (known: {', '.join(ROLES)})")


def _content(entry: Fields, name: str, *, optional: bool) -> str:
    """A turn's text; parts that are all text are joined."""
    parts = entry.given.get(name)
    if not isinstance(parts, list):
        return entry.text(name, optional=optional)
    texts = []
    for number, part in enumerate(parts, start=1):
        place = f"{entry.label}{name!r} must be text, got a list whose part {number}"
        kind = part.get("type", "text") if isinstance(part, Mapping) else ""
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            read = kind in (*_TEXT_PARTS, "")
            raise BadRow(f"{place} {'has no text' if read else f'is of type {kind!r}, which is not read yet'}")
        lost = [
            key for key, value in part.items() if key not in ("type", "text", "cache_control") and not is_empty(value)
        ]
        if lost:
            raise BadRow(f"{place} has {', '.join(map(repr, lost))}, which would be lost")
        texts.append(part["text"])
    return Fields({name: "".join(texts)}, entry.label).text(name, optional=optional)


def _calls(calls: Any, label: str) -> list[dict[str, Any]]:
    """OpenAI's tool calls, each with its arguments as an object."""
    lost = f"{label}'tool_calls' would be lost: "
    if not isinstance(calls, list):
        raise BadRow(f"{lost}expected a list, got {kind_of(calls)}")
    found = []
    for number, call in enumerate(calls, start=1):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(f"{lost}call {number} names no function; expected {{'function': {{'name', 'arguments'}}}}")
        arguments = function.get("arguments") or {}
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            raise BadRow(f"{lost}the arguments of call {number} are no JSON: {arguments!r:.60}") from None
        if not isinstance(arguments, Mapping):
            raise BadRow(f"{lost}the arguments of call {number} are {kind_of(arguments)}, not an object")
        rest = {key: value for key, value in call.items() if value is not None}
        found.append(rest | {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}})
    return found


def read_tools(record: Fields, names: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """The tools of a row as JSON schemas of functions; OpenAI's older `functions` are wrapped as tools."""
    name = record.one_of(names)
    if not name:
        return ()
    tools = record.parsed(name)
    if is_empty(tools):
        return ()
    found = []
    for number, tool in enumerate(tools if isinstance(tools, list) else [tools], start=1):
        bare = isinstance(tool, Mapping) and isinstance(tool.get("name"), str) and "function" not in tool
        wrapped: Any = {"type": "function", "function": tool} if bare else tool
        function = wrapped.get("function") if isinstance(wrapped, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"{name!r}: tool {number} names no function, got {kind_of(tool)}")
        found.append(_without_nulls(wrapped))
    return tuple(found)


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object of a column the keys of all of them, null where they were absent."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
