"""From records to rows: messages, ShareGPT, Alpaca, prompt/completion and plain text.

| format            | fields of a record                                                      |
| ----------------- | ----------------------------------------------------------------------- |
| messages          | `messages`: a list of `{"role", "content"}` (OpenAI)                    |
| sharegpt          | `conversations`: a list of `{"from", "value"}`                          |
| alpaca            | `instruction`, `output` and, if there is one, `input`                   |
| prompt-completion | `prompt`, `completion`: joined as they are, nothing added between them  |
| text              | `text`: all of it is learned                                            |

The format is found by the columns of the file, never guessed from their values. A turn may say `"weight": 0` or
`"train": false` to be read but not learned. Columns that no format uses are named by `Rows.describe`; fields of a
*turn* that would be lost (tool calls, say) are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.errors import DataError, nearest
from gossamer.training.containers import Faults, kind_of, read_table

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_PAIRED = ", paired with an input that provides further context"
_ALPACA_REQUEST = ". Write a response that appropriately completes the request."

_UNUSABLE = "the file has rows that cannot be used"


class Turn(NamedTuple):
    """One turn of a chat; `supervised` says whether its text is learned."""

    role: str
    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, in the shape that its format allows.

    A chat has `turns`; a prompt with its completion has `prompt` and `completion`; plain text has `text`. An Alpaca row
    has turns *and* a prompt: the first for tokenizers with a chat template, the second for those without.
    """

    where: str
    """`file:row`, for messages."""
    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""

    @property
    def label(self) -> str:
        """What a classifier is to answer: the completion, or a chat's last learned turn; empty for plain text."""
        return self.completion or next((turn.text for turn in reversed(self.turns) if turn.supervised), "")


@dataclass(frozen=True)
class Rows:
    """All rows of one file, valid one by one."""

    path: str
    container: str
    format: str
    digest: str
    """sha256 of the file, in hex: a resumed run compares it."""
    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    """Columns of the file that the format does not use."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def describe(self) -> str:
        """One line, such as `reviews/train.jsonl: 2,966 rows of prompt/completion (jsonl)`."""
        unused = f"; columns not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.path}: {len(self):,} rows of {self.format.replace('-', '/')} ({self.container}){unused}"


def read_rows(path: str | Path, *, format: str | None = None) -> Rows:
    """Read a data file and validate every row of it.

    Args:
        path: a .jsonl, .json, .csv or .parquet file.
        format: a key of `FORMATS`; found by the columns if not given.

    Raises `DataError` with every fault of the file, each with its row and reason; `UnsupportedError` without pyarrow.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"unknown data format {format!r}", expected=", ".join(FORMATS), hint=nearest(format, FORMATS))
    faults = Faults(path)
    table = read_table(path, faults)
    columns = list(dict.fromkeys(column for _, record in table.records for column in record))
    chosen = FORMATS[format or _detect(columns, faults)]
    rows = []
    for number, record in table.records:
        try:
            rows.append(chosen.build(_Fields(record), f"{path}:{number}"))
        except _BadRow as bad:
            faults.add(number, str(bad))
    faults.check(_UNUSABLE)
    unused = tuple(column for column in columns if column not in (*chosen.required, *chosen.optional))
    return Rows(table.path, table.container, chosen.name, table.digest, tuple(rows), unused)


def labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """The distinct labels of a classification set, sorted. Raises `DataError` if there are fewer than two."""
    found = tuple(sorted({row.label for row in rows}))
    if len(found) < 2 or "" in found:
        raise DataError("a classifier needs rows with at least two different labels", got=f"{list(found)}",
                        hint="the label is the completion of a row, or a chat's last turn")  # fmt: skip
    return found


def _detect(columns: list[str], faults: Faults) -> str:
    fitting = [one.name for one in FORMATS.values() if set(one.required) <= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    faults.check(_UNUSABLE)  # a column may be missing because its rows could not be read
    known = {column for one in FORMATS.values() for column in (*one.required, *one.optional)}
    similar = {column: nearest(column, known, count=1) for column in columns if column not in known}
    hints = [f"{column!r}: {hint}" for column, hint in similar.items() if hint]
    raise DataError(
        f"the columns fit {' and '.join(fitting)}" if fitting else "the columns fit no known data format",
        where=faults.path, got=f"columns: {', '.join(columns) or 'none'}",
        expected="; ".join(f"{one.name}: {', '.join(one.required)}" for one in FORMATS.values()),
        hint="choose one with format=..." if fitting else "; ".join(hints),
    )  # fmt: skip


class _BadRow(ValueError):
    """The reason why a row cannot be used."""


class _Fields:
    """A record whose fields are asked for by name and type. A null field is an absent one, as Parquet writes it."""

    def __init__(self, record: Any, label: str = "") -> None:
        if not isinstance(record, Mapping):
            raise _BadRow(f"{label}must be an object, got {kind_of(record)}")
        self.given = {name: value for name, value in record.items() if value is not None}
        self.null = set(record) - set(self.given)
        self.label = label

    def text(self, name: str, *, optional: bool = False) -> str:
        """A field that holds text which a tokenizer can take; empty only where it is optional."""
        if name not in self.given:
            if optional:
                return ""
            found = "is null" if name in self.null else f"is missing; found {', '.join(self.given) or 'no fields'}"
            raise _BadRow(f"{self.label}{name!r} {found}")
        value = self.given[name]
        if not isinstance(value, str):
            raise _BadRow(f"{self.label}{name!r} must be text, got {kind_of(value)}")
        if not optional and not value.strip():
            raise _BadRow(f"{self.label}{name!r} is empty")
        if "\0" in value:
            raise _BadRow(f"{self.label}{name!r} holds a NUL character at position {value.index(chr(0))}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadRow(f"{self.label}{name!r} holds half a surrogate pair at position {error.start}") from None
        return value

    def turns(self, name: str) -> list[Any]:
        """A field that holds a list of turns."""
        if name not in self.given:
            return [self.text(name)]  # says that it is missing, or null
        value = self.given[name]
        if not isinstance(value, list) or not value:
            raise _BadRow(f"{name!r} must be a list of turns, got {kind_of(value) if value != [] else 'an empty list'}")
        return value


def _chat(list_field: str, role_field: str, text_field: str) -> Callable[[_Fields, str], Row]:
    """The builder for a list of turns under the given field names."""

    def build(record: _Fields, where: str) -> Row:
        turns = tuple(
            _turn(_Fields(entry, f"turn {number}: "), role_field, text_field)
            for number, entry in enumerate(record.turns(list_field), start=1)
        )
        if not any(turn.role == "assistant" for turn in turns):
            raise _BadRow("no assistant turn, so there is nothing to learn")
        if not any(turn.supervised for turn in turns):
            raise _BadRow("every assistant turn is switched off by its weight, so there is nothing to learn")
        return Row(where, turns=turns)

    return build


def _turn(entry: _Fields, role_field: str, text_field: str) -> Turn:
    lost = sorted(set(entry.given) - {role_field, text_field, "weight", "train"})
    if lost:
        known = f"{role_field!r}, {text_field!r}, 'weight' and 'train'"
        raise _BadRow(f"{entry.label}{', '.join(map(repr, lost))} would be lost; a turn has {known}")
    role = entry.text(role_field)
    role = _SHAREGPT_ROLES.get(role, role) if role_field == "from" else role
    if role not in ROLES:
        hint = nearest(role, (*ROLES, *_SHAREGPT_ROLES) if role_field == "from" else ROLES)
        raise _BadRow(f"{entry.label}unknown role {role!r}{'; ' + hint if hint else ''} (known: {', '.join(ROLES)})")
    switches = {name: entry.given[name] for name in ("weight", "train") if name in entry.given}
    if wrong := [name for name, value in switches.items() if value not in (0, 1)]:  # false and true are 0 and 1
        raise _BadRow(f"{entry.label}{wrong[0]!r} must be 0 or 1, got {kind_of(switches[wrong[0]])}")
    if role != "assistant" and any(switches.values()):
        raise _BadRow(f"{entry.label}only assistant turns are learned, but this {role} turn asks for it")
    return Turn(role, entry.text(text_field), role == "assistant" and all(switches.values()))


def _alpaca(record: _Fields, where: str) -> Row:
    """The prompt is Stanford Alpaca's, word for word; a chat template gets instruction and input as one user turn."""
    instruction, output = record.text("instruction"), record.text("output")
    given = record.text("input", optional=True)
    head = _ALPACA_TASK + (_ALPACA_PAIRED if given else "") + _ALPACA_REQUEST
    sections = [f"### Instruction:\n{instruction}", *([f"### Input:\n{given}"] if given else []), "### Response:"]
    question = f"{instruction}\n\n{given}" if given else instruction
    turns = (Turn("user", question, False), Turn("assistant", output, True))
    return Row(where, turns=turns, prompt="\n\n".join([head, *sections]), completion=output)


class Format(NamedTuple):
    """A data format: the columns it is known by, those it may also use, and how a record becomes a row."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[_Fields, str], Row]


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format("messages", ("messages",), (), _chat("messages", "role", "content")),
        Format("sharegpt", ("conversations",), (), _chat("conversations", "from", "value")),
        Format("alpaca", ("instruction", "output"), ("input",), _alpaca),
        Format("prompt-completion", ("prompt", "completion"), (),
               lambda record, where: Row(where, prompt=record.text("prompt"), completion=record.text("completion"))),
        Format("text", ("text",), (), lambda record, where: Row(where, text=record.text("text"))),
    )
}  # fmt: skip
