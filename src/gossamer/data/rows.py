"""Rows: one small class for each shape that a record can have, whatever format or container it came in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from gossamer.errors import DataError


class Turn(NamedTuple):
    """One turn of a chat; `supervised` says whether its text is learned."""

    role: str
    text: str
    supervised: bool
    fields: tuple[tuple[str, Any], ...] = ()
    """What else the chat template is given of it: `name`, `tool_calls`, `tool_call_id`."""

    def message(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        return {"role": self.role, "content": self.text, **dict(self.fields)}

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The functions that the turn calls: `{"name", "arguments"}`."""
        return [call["function"] for name, value in self.fields if name == "tool_calls" for call in value]


@dataclass(frozen=True, slots=True)
class Row(ABC):
    """One row of a data set."""

    where: str
    """`file:row`, for messages."""

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """Every text of the row."""

    @property
    def question(self) -> str:
        """What stands right before the answer; empty where there is none."""
        return ""

    @property
    def label(self) -> str:
        """What a classifier is to answer; empty where there is none."""
        return ""

    @abstractmethod
    def answering(self, label: str) -> Self:
        """The row with another label."""


@dataclass(frozen=True, slots=True)
class Chat(Row):
    """Turns, and what the chat template is told that the model may call."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of functions."""

    def texts(self) -> Iterator[str]:
        return (turn.text for turn in self.turns)

    @property
    def last(self) -> int:
        """The place of the last learned turn; -1 if there is none."""
        return max((place for place, turn in enumerate(self.turns) if turn.supervised), default=-1)

    @property
    def question(self) -> str:
        """The turn before the last learned one."""
        return self.turns[self.last - 1].text if self.last > 0 else ""

    @property
    def label(self) -> str:
        """The last learned turn."""
        return self.turns[self.last].text if self.last >= 0 else ""

    def answering(self, label: str) -> Chat:
        answer = self.turns[self.last]._replace(text=label)
        return replace(self, turns=(*self.turns[: self.last], answer, *self.turns[self.last + 1 :]))


@dataclass(frozen=True, slots=True)
class Completion(Row):
    """A prompt, and the completion that is learned; both are joined as they are."""

    prompt: str
    completion: str

    def texts(self) -> Iterator[str]:
        return iter((self.prompt, self.completion))

    @property
    def question(self) -> str:
        return self.prompt

    @property
    def label(self) -> str:
        return self.completion

    def answering(self, label: str) -> Completion:
        return replace(self, completion=label)


@dataclass(frozen=True, slots=True)
class Instruction(Row):
    """An instruction and its answer: a chat where the tokenizer has a template, a filled-in form where it has none."""

    chat: Chat
    plain: Completion

    def texts(self) -> Iterator[str]:
        yield from self.plain.texts()
        yield from self.chat.texts()

    @property
    def question(self) -> str:
        return self.plain.prompt

    @property
    def label(self) -> str:
        return self.plain.completion

    def answering(self, label: str) -> Instruction:
        return replace(self, chat=self.chat.answering(label), plain=self.plain.answering(label))


@dataclass(frozen=True, slots=True)
class Text(Row):
    """Plain text, all of which is learned."""

    text: str

    def texts(self) -> Iterator[str]:
        return iter((self.text,))

    def answering(self, label: str) -> Text:
        """Raises `DataError`: a text has no label."""
        raise DataError("plain text has no label to compare", where=self.where)


def labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """The distinct labels of a classification set, sorted. Raises `DataError` if there are fewer than two."""
    found = tuple(sorted({row.label for row in rows}))
    if len(found) < 2 or "" in found:
        plain = found == ("",)
        got = "texts without a label" if plain else f"{list(found)}"
        renamed = "name the column of the text 'prompt' and that of the label 'completion'; " if plain else ""
        raise DataError("a classifier needs rows with at least two different labels", got=got,
                        hint=f"{renamed}the label is the completion of a row, or a chat's last turn")  # fmt: skip
    return found
