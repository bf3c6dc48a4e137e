"""From a file, or records in memory, to rows: messages, ShareGPT, Alpaca, prompt/completion and plain text.

| format            | fields of a record                                                      |
| ----------------- | ----------------------------------------------------------------------- |
| messages          | `messages`: a list of `{"role", "content"}` (OpenAI)                    |
| sharegpt          | `conversations`: a list of `{"from", "value"}`                          |
| alpaca            | `instruction`, `output` and, if there are any, `input` and `history`    |
| prompt-completion | `prompt`, `completion`: joined as they are; or two lists of turns (TRL) |
| text              | `text`: all of it is learned                                            |

Beside turns, `system` is the text before them and `tools` what the model may call. The format is found by the columns
of the file, never guessed from their values. A turn may say `"weight": 0` or `"train": false` to be read but not
learned. Columns that no format uses are named by `Rows.describe`; a row in which one of them says what is to be learned
(`images`, `chosen`, `"label": false`: see `columns`) is refused, and so is a field of a *turn* that would be lost.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from gossamer.data.columns import HISTORY, SYSTEM, TOOLS, Carrying, is_empty, rename_hint
from gossamer.data.containers import RowFaults, Table, kind_of, read_table
from gossamer.data.conversations import BadRow, Fields, read_tools, read_turns
from gossamer.data.rows import Chat, Completion, Instruction, Text, Turn
from gossamer.data.rows import Row as AnyRow  # `Row` was a function here, which `moved` still answers for
from gossamer.errors import DataError, nearest

_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_PAIRED = ", paired with an input that provides further context"
_ALPACA_REQUEST = ". Write a response that appropriately completes the request."

_TURNS_AS_TEXT = re.compile(r"""\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
_UNUSABLE = "the file has rows that cannot be used"


Records = Iterable[AnyRow] | Iterable[Mapping[str, Any]]
"""Rows, or records in any of the known formats: a list, a `datasets.Dataset`, or anything else that gives them."""


@dataclass(frozen=True)
class Rows:
    """All rows of one file, or what was in memory, valid one by one."""

    path: str
    """The file; "memory" for rows that came from none."""
    container: str
    format: str
    digest: str
    """sha256 of the file, or of what the rows hold, in hex: a resumed run compares it."""
    rows: tuple[AnyRow, ...] = field(repr=False, compare=False)
    unused: tuple[str, ...] = ()
    """Columns that the format does not use."""
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[AnyRow]:
        return iter(self.rows)

    @property
    def source(self) -> str:
        """What a config says of them: the file; of rows in memory, what they were."""
        if not self.in_memory:
            return self.path
        return f"{self.path}: {len(self):,} rows of {self.format}, sha256 {self.digest}"

    def describe(self) -> str:
        """One line, such as `reviews/train.jsonl: 2,966 rows of prompt/completion (jsonl)`."""
        unused = f"; columns not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.path}: {len(self):,} rows of {self.format.replace('-', '/')} ({self.container}){unused}"


def read_data(source: str | os.PathLike[str] | Rows | Records, *, format: str | None = None) -> Rows:
    """The rows of a file, or of what is in memory, validated one by one.

    Args:
        source: a .jsonl, .json, .csv or .parquet file; rows; or records in any of the known formats, such as a list of
            dicts or a `datasets.Dataset`.
        format: a key of `FORMATS`; found by the columns if not given.

    Raises `DataError` with every fault, each with its row and reason.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | os.PathLike):
        if re.match(r"memory: .* sha256 \w+$", str(source)):
            raise DataError("these rows were in memory, not in a file", got=str(source),
                            hint="pass them again: TrainConfig(data=rows, ...), with resume=True to go on")  # fmt: skip
        return read_rows(source, format=format)
    return _in_memory(source, format)


def _in_memory(source: Any, format: str | None) -> Rows:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError("rows in memory are a list of records, or another iterable of them", got=type(source).__name__,
                        hint="of several splits, choose one")  # fmt: skip
    given, faults = list(source), RowFaults("memory")
    if not given:
        raise DataError("there are no rows", where=faults.path, got=f"an empty {type(source).__name__}")
    kind = AnyRow if isinstance(given[0], AnyRow) else Mapping
    for number, one in enumerate(given, start=1):
        if not isinstance(one, kind):
            expected = "a row, like the first one" if kind is AnyRow else "a record: a mapping of names to values"
            faults.add(number, f"expected {expected}; got {type(one).__name__} {one!r:.40}")
    faults.check("these rows cannot be used", hint="of a pandas.DataFrame, pass to_dict('records')")
    if kind is AnyRow:
        rows, name, unused = tuple(given), " and ".join(sorted({type(one).__name__.lower() for one in given})), ()
    else:
        records = [(number, dict(record)) for number, record in enumerate(given, start=1)]
        found = parse_records(Table(faults.path, type(source).__name__, "", records), faults, format)
        rows, name, unused = found.rows, found.format, found.unused
    return Rows(faults.path, type(source).__name__, name, _digest(rows), rows, unused, in_memory=True)


def _digest(rows: Iterable[AnyRow]) -> str:
    """sha256 of what the rows hold, wherever they stand."""
    total = hashlib.sha256()
    for row in rows:
        held = asdict(row, dict_factory=lambda fields: {name: value for name, value in fields if name != "where"})
        total.update(json.dumps([type(row).__name__, held], sort_keys=True, default=str).encode())
    return total.hexdigest()


def read_rows(path: str | os.PathLike[str], *, format: str | None = None) -> Rows:
    """Read a data file and validate every row of it.

    Args:
        path: a .jsonl, .json, .csv or .parquet file.
        format: a key of `FORMATS`; found by the columns if not given.

    Raises `DataError` with every fault of the file, each with its row and reason; `UnsupportedError` without pyarrow.
    """
    faults = RowFaults(path)
    return parse_records(read_table(path, faults), faults, format)


def parse_records(table: Table, faults: RowFaults, format: str | None = None) -> Rows:
    """The rows that records mean. Raises `DataError` with every fault."""
    if format is not None and format not in FORMATS:
        raise DataError(f"unknown data format {format!r}", expected=", ".join(FORMATS), hint=nearest(format, FORMATS))
    columns = list(dict.fromkeys(column for _, record in table.records for column in record))
    chosen = FORMATS[format or _detect(columns, table, faults)]
    carrying = Carrying(columns, (*chosen.required, *chosen.optional), chosen.name)
    rows = []
    for number, record in table.records:
        try:
            row = chosen.build(Fields(record), f"{table.path}:{number}")
            if carrying and (fault := carrying.fault(record, row.texts())):
                raise BadRow(fault)
            rows.append(row)
        except BadRow as bad:
            faults.add(number, str(bad))
    faults.check(_UNUSABLE, hint=carrying.hint)
    unused = tuple(column for column in columns if column not in (*chosen.required, *chosen.optional))
    return Rows(table.path, table.container, chosen.name, table.digest, tuple(rows), unused)


def row_of(
    where: str,
    turns: tuple[Turn, ...] = (),
    prompt: str = "",
    completion: str = "",
    text: str = "",
    tools: tuple[dict[str, Any], ...] = (),
) -> AnyRow:
    """The row that has these fields, of the class that its filled fields tell."""
    if turns and completion:
        return Instruction(where, Chat(where, turns, tools), Completion(where, prompt, completion))
    if turns:
        return Chat(where, turns, tools)
    return Completion(where, prompt, completion) if completion else Text(where, text)


def _fitting(columns: Iterable[str]) -> list[str]:
    return [one.name for one in FORMATS.values() if set(one.required) <= {*columns}]


def _detect(columns: list[str], table: Table, faults: RowFaults) -> str:
    fitting = _fitting(columns)
    if len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        _refuse_mixture(table, faults)
    faults.check(_UNUSABLE)  # a column may be missing because its rows could not be read
    known = {column for one in FORMATS.values() for column in (*one.required, "input")}
    raise DataError(
        f"the columns fit {' and '.join(fitting)}" if fitting else "the columns fit no known data format",
        where=faults.path, got=f"columns: {', '.join(columns) or 'none'}",
        expected="; ".join(f"{one.name}: {', '.join(one.required)}" for one in FORMATS.values()),
        hint="choose one with format=..." if fitting else rename_hint(columns, known),
    )  # fmt: skip


def _refuse_mixture(table: Table, faults: RowFaults) -> None:
    """Name the rows that are of another format than most, if no format fits all of them."""
    fits = [(number, _fitting(record)) for number, record in table.records]
    counts = Counter(name for _, names in fits for name in names)
    (most, count), *_ = counts.most_common(1) or [("", len(fits))]
    if count == len(fits):
        return
    for number, names in fits:
        if most not in names and names:
            faults.add(number, f"a row of {' and '.join(names)}, but {count:,} of {len(fits):,} rows are of {most}")
    faults.check(_UNUSABLE, hint="one file has rows of one format")


def _chat(list_field: str, role_field: str, text_field: str) -> Callable[[Fields, str], AnyRow]:
    def build(record: Fields, where: str) -> AnyRow:
        return _chat_row(record, where, read_turns(record.turns(list_field), role_field, text_field))

    return build


def _chat_row(record: Fields, where: str, turns: tuple[Turn, ...]) -> Chat:
    """A chat with the system text and the tools that stand beside it. Raises `BadRow` if it teaches nothing."""
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow("no assistant turn, so there is nothing to learn")
    if not any(turn.supervised for turn in turns):
        raise BadRow("every assistant turn is switched off by its weight, so there is nothing to learn")
    return Chat(where, _with_system(record, turns), read_tools(record, TOOLS))


def _with_system(record: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    name = record.one_of(SYSTEM)
    if not name:
        return turns
    system = Turn("system", record.text(name), False)
    if turns[0].role != "system":
        return (system, *turns)
    if turns[0].text.strip() == system.text.strip():
        return turns
    raise BadRow(f"{name!r} and the system turn say different things; only one may stand before the chat")


def _alpaca(record: Fields, where: str) -> AnyRow:
    """The prompt is Stanford Alpaca's, word for word; a chat template gets instruction and input as one user turn.

    A system text takes the place of the prompt's first sentences, as in LLaMA-Factory, and earlier turns are learned
    too, as there. Earlier turns and tools have no place in the plain form, so such a row is a chat only.
    """
    instruction, output = record.text("instruction"), record.text("output")
    given = "" if is_empty(record.given.get("input")) else record.text("input")
    question = f"{instruction}\n\n{given}" if given else instruction
    turns = (*_history(record), Turn("user", question, False), Turn("assistant", output, True))
    chat = _chat_row(record, where, turns)
    if len(turns) > 2 or chat.tools:
        return chat
    head = _ALPACA_TASK + (_ALPACA_PAIRED if given else "") + _ALPACA_REQUEST
    head = chat.turns[0].text if chat.turns[0].role == "system" else head
    sections = [f"### Instruction:\n{instruction}", *([f"### Input:\n{given}"] if given else []), "### Response:"]
    return Instruction(where, chat, Completion(where, "\n\n".join([head, *sections]), output))


def _history(record: Fields) -> Iterator[Turn]:
    """Earlier turns: a list of `[question, answer]`."""
    if not record.one_of(HISTORY):
        return
    pairs = record.parsed("history")
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"'history': entry {number} must be [question, answer], got {kind_of(pair)}")
        texts = Fields(dict(zip(("question", "answer"), pair, strict=True)), f"'history': entry {number}: ")
        yield Turn("user", texts.text("question"), False)
        yield Turn("assistant", texts.text("answer"), True)


def _no_turns(record: Fields, name: str) -> str:
    """A text that is not a list of turns in disguise, as tables write lists into their cells."""
    text = record.text(name)
    if _TURNS_AS_TEXT.match(text):
        raise BadRow(f"{name!r} holds a list of turns as text, {text!r:.40}; in JSON Lines it can be a list")
    return text


def _prompt_completion(record: Fields, where: str) -> AnyRow:
    """Two texts, or TRL's conversational form: two lists of turns, of which the second is learned."""
    prompt, completion = (record.given.get(name) for name in ("prompt", "completion"))
    turns = [
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) for value in (prompt, completion)
    ]
    if not all(turns):
        row = Completion(where, _no_turns(record, "prompt"), record.text("completion"))
        if name := record.one_of(SYSTEM) or record.one_of(TOOLS):
            raise BadRow(f"{name!r} would be lost: two texts are joined as they are; "
                         "write it into the prompt, or both as lists of turns")  # fmt: skip
        return row
    before, answer = read_turns(record.turns("prompt")), read_turns(record.turns("completion"))
    for number, entry in enumerate(record.turns("prompt"), start=1):
        if any(entry.get(name) for name in ("train", "weight")):  # of the assistant: others are refused above
            raise BadRow(f"'prompt': turn {number} asks to be learned, but of two lists of turns the second is; "
                         "write both into 'messages'")  # fmt: skip
    if any(turn.role != "assistant" and turn.role != "tool" for turn in answer):
        raise BadRow("'completion' holds a turn that is not the assistant's")
    return _chat_row(record, where, (*(turn._replace(supervised=False) for turn in before), *answer))


class RecordFormat(NamedTuple):
    """A data format: the columns it is known by, those it may also use, and how a record becomes a row."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Fields, str], AnyRow]


FORMATS: dict[str, RecordFormat] = {
    one.name: one
    for one in (
        RecordFormat("messages", ("messages",), (*SYSTEM, *TOOLS), _chat("messages", "role", "content")),
        RecordFormat("sharegpt", ("conversations",), (*SYSTEM, *TOOLS), _chat("conversations", "from", "value")),
        RecordFormat("alpaca", ("instruction", "output"), ("input", *SYSTEM, *TOOLS, *HISTORY), _alpaca),
        RecordFormat("prompt-completion", ("prompt", "completion"), (*SYSTEM, *TOOLS), _prompt_completion),
        RecordFormat("text", ("text",), (), lambda record, where: Text(where, _no_turns(record, "text"))),
    )
}  # fmt: skip
