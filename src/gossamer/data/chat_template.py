r"""From a row to the text a model sees, cut where learning starts and stops.

    messages, one chat template:    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   Hello!<|im_end|>
                                    |----------------- prompt, not learned ----------------|   |--- learned --|

The cut needs no `{% generation %}` marks in the template. What stands before a turn is what the template renders for
the turns before it plus the generation prompt: exactly what the model is given when it is to answer. The whole chat
must begin with that text and go on with the turn's text and an end-of-turn token. If it does not, because the template
strips or rewrites turns, the row is refused: a mask for it would be a guess. It is refused, too, where the template
leaves out what the row says: a system text, a question, a tool.

A turn that calls tools has no text that could be looked for. There, what the template adds to the generation prompt is
learned, up to an end-of-turn token, and must name the functions and their arguments.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from gossamer.data import clock
from gossamer.data.rows import Chat, Completion, Instruction, Row, Text, Turn
from gossamer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MaskedText(NamedTuple):
    """A stretch of text that is learned as a whole or not at all.

    A learned piece ends with the token `end` (`""` where none is asked for).
    """

    text: str
    supervised: bool = False
    end: str = ""


class Unprovable(ValueError):
    """The reason why no mask can be proven right for a row, and what to do about it."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


_REWRITES = 'a row for each answer, or "train": false on the earlier ones, teaches what the template does write'
_NO_TEMPLATE = "use the tokenizer of a chat model, or write the rows as prompt and completion"
_TOOLS = "choose a template that knows tools, or write them and their calls into the texts"


class ChatRenderer:
    """Writes rows as pieces, the way one tokenizer wants them.

    Args:
        tokenizer: any transformers tokenizer; its sandbox renders the chat template.
        add_eos: end completions and plain texts with the tokenizer's EOS. Chats end as their template says.
        chat_template: use the tokenizer's template where a row has a plain form too (Alpaca).
        date: the day that a template is told, as `2026-12-31`; today when None.

    Attributes:
        notes: what is worth saying of the rows written so far -> how many rows.

    Raises `DataError` if EOS is asked for and the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, add_eos: bool = True, chat_template: bool = True,
                 date: str | None = None) -> None:  # fmt: skip
        self.tokenizer, self.date = tokenizer, date or clock.today()
        self.templated = chat_template and bool(tokenizer.chat_template)
        self.eos = str(tokenizer.eos_token or "") if add_eos else ""
        if add_eos and not self.eos:
            raise DataError("the tokenizer has no EOS token, so the model could not learn where to stop",
                            hint="set tokenizer.eos_token, or add_eos=False")  # fmt: skip
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        stop = str(tokenizer.eos_token or "")
        ends = special - {str(tokenizer.bos_token)} | {stop} - {""}
        end = f"({'|'.join(sorted(map(re.escape, ends), key=len, reverse=True))})"
        # Some templates end a turn with one token and then, at once or after the last turn, write the EOS.
        last = r"\Z" if stop == tokenizer.bos_token else ""  # elsewhere it may as well begin the next turn
        then_stop = rf"(?:\s*({re.escape(stop)}){last})?" if stop else "()"
        self.end_of_turn = re.compile(rf"\s*{end}{then_stop}")
        self.end_of_call = re.compile(rf"{end}{then_stop}\s*\Z")
        self.notes: Counter[str] = Counter()

    def form(self, row: Row) -> Row:
        """The row in the one of its forms that this tokenizer is to learn."""
        if not isinstance(row, Instruction):
            return row
        return row.chat if self.templated else row.plain

    def render(self, row: Row) -> list[MaskedText]:
        """A form as text, in order. Raises `Unprovable` where it cannot be told what is to be learned."""
        match row:
            case Chat():
                return self._chat(row)
            case Completion(prompt=prompt, completion=answer):
                before = [MaskedText(prompt)]
            case Text(text=answer):
                before = []
            case _:
                raise Unprovable(f"a row of {type(row).__name__} is no text to learn")
        if self.eos and self.eos in answer:
            raise Unprovable(f"the text itself holds the end token {self.eos!r}")
        return [*before, MaskedText(answer + self.eos, True, self.eos)]

    def _chat(self, row: Chat) -> list[MaskedText]:
        """The turns up to the last learned one; what comes later could not change what is learned."""
        if not self.templated:
            raise Unprovable("the row is a chat, but the tokenizer has no chat template in use", _NO_TEMPLATE)
        learned = [index for index, turn in enumerate(row.turns) if turn.supervised]
        whole = self._render(row, learned[-1] + 1)
        pieces: list[MaskedText] = []
        position = 0
        for index in learned:
            head = self._render(row, index, generation_prompt=True)
            if not whole.startswith(head) or len(head) < position:
                raise Unprovable(f"turn {index + 1}: the chat template rewrites the turns before it once it is there, "
                                 "or writes another beginning than it asks for", _REWRITES)  # fmt: skip
            turn = row.turns[index]
            if turn.calls:
                answer = self._call(whole, self._render(row, index + 1), len(head), turn, index + 1)
            else:
                answer = self._answer(whole, len(head), turn.text, index + 1)
            pieces += [MaskedText(whole[position : len(head)]), answer]
            position = len(head) + len(answer.text)
        self._refuse_losses(row, learned[-1] + 1, whole)
        return pieces

    def _answer(self, whole: str, start: int, text: str, number: int) -> MaskedText:
        """The assistant's text with its end-of-turn token, and the EOS if the template goes on with it.

        White space around it is the template's affair.
        """
        stripped = text.strip()
        begin = start + len(whole[start:]) - len(whole[start:].lstrip())
        if not whole.startswith(stripped, begin):
            raise Unprovable(f"turn {number}: the chat template rewrites the assistant's text; "
                             f"expected {stripped!r:.60}, got {whole[start:]!r:.60}", _REWRITES)  # fmt: skip
        end = self.end_of_turn.match(whole, begin + len(stripped))
        if not end:
            raise Unprovable(f"turn {number}: no end-of-turn token follows the assistant's text, but "
                             f"{whole[begin + len(stripped) :]!r:.60}",
                             "a chat template ends an answer with EOS or another special token")  # fmt: skip
        for token in filter(None, end.groups()):
            if token in text:
                raise Unprovable(f"turn {number}: the text itself holds the end-of-turn token {token!r}")
        return MaskedText(whole[start : end.end()], True, end[2] or end[1])

    def _call(self, whole: str, through: str, start: int, turn: Turn, number: int) -> MaskedText:
        """What the template adds for a turn that calls tools, whose text ends with `through` or before."""
        same = next((at for at, (one, other) in enumerate(zip(whole, through, strict=False)) if one != other), None)
        added = whole[start : len(through) if same is None else same].rstrip()
        end = self.end_of_call.search(added)
        if not end:
            raise Unprovable(f"turn {number}: no end-of-turn token follows the tool calls, but {added[-40:]!r}")
        said = {turn.text.strip(): None, **{text: None for call in turn.calls for text in _leaves(call)}}
        if lost := [text for text in said if not _holds(added, text)]:
            raise Unprovable(f"turn {number}: the chat template does not write all of the tool calls; "
                             f"{lost[0]!r:.60} is not in {added!r:.80}", _TOOLS)  # fmt: skip
        return MaskedText(added, True, end[2] or end[1])

    def _refuse_losses(self, row: Chat, count: int, whole: str) -> None:
        """Refuse a row of which the template leaves out something that is given and not learned."""
        for number, turn in enumerate(row.turns[:count], start=1):
            if turn.role != "assistant" and not _holds(whole, turn.text.strip()):
                raise Unprovable(f"turn {number}: the chat template does not write the {turn.role} turn as it is",
                                 "put that text where the template keeps it, or leave it out")  # fmt: skip
            for call in turn.calls:
                if not _holds(whole, call["name"]):
                    raise Unprovable(
                        f"turn {number}: the chat template does not write the call of {call['name']!r}", _TOOLS
                    )
            name = dict(turn.fields).get("name")
            if name and turn.role != "tool" and not _holds(whole, name):
                self.notes["with a name that the chat template does not write"] += 1
        if row.tools:
            bare = self._render(replace(row, tools=()), count)
            said = (text for tool in row.tools for text in _signature(tool))
            if lost := [text for text in said if whole.count(text) <= bare.count(text)]:
                raise Unprovable(f"the chat template does not write the tools; {lost[0]!r:.60} is not in the text",
                                 _TOOLS)  # fmt: skip

    def _render(self, row: Chat, count: int, *, generation_prompt: bool = False) -> str:
        """The first `count` turns as the tokenizer's chat template writes them."""
        from jinja2 import TemplateError

        messages = [turn.message() for turn in row.turns[:count]]
        options: dict[str, Any] = {"tools": [*row.tools]} if row.tools else {}
        if self.dated:
            options["chat_template"] = clock.pinned(self.tokenizer.get_chat_template(**options), self.date)
        write = self.tokenizer.apply_chat_template
        try:
            return str(write(messages, tokenize=False, add_generation_prompt=generation_prompt, **options))
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise Unprovable(f"the chat template refuses the first {count} turns: {error!s:.200}",
                             self._remedy(row, count)) from None  # fmt: skip

    def _remedy(self, row: Chat, count: int) -> str:
        """What to do about turns that the template refuses, found by trying."""
        if row.turns[0].role != "system" or count < 2:
            return ""
        try:
            self._render(replace(row, turns=row.turns[1:]), count - 1)
        except Unprovable:
            return ""
        return "the template takes no system turn; put that text in front of the first user turn, or leave it out"

    @cached_property
    def dated(self) -> bool:
        """Whether the template asks what day it is. Raises `DataError` for one that draws random numbers."""
        kept = self.tokenizer.chat_template if self.templated else ""
        templates = [str(one) for one in (kept.values() if isinstance(kept, Mapping) else (kept,))]
        if any(map(clock.draws, templates)):
            raise DataError("the chat template draws random numbers, so no row could be written twice alike",
                            hint="take what is random out of the template")  # fmt: skip
        return any(map(clock.asks_date, templates))


def _holds(whole: str, text: str) -> bool:
    """Whether a text stands in another, plainly or as JSON writes it."""
    return text in whole or any(json.dumps(text, ensure_ascii=ascii)[1:-1] in whole for ascii in (False, True))


def _leaves(value: Any) -> Iterator[str]:
    """The keys and the texts and numbers in a JSON value; not the words `name` and `arguments` of a call itself."""
    if isinstance(value, Mapping):
        yield from (str(key) for key in value if key not in ("name", "arguments"))
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(inner)
    elif value is not None and not isinstance(value, bool | float):
        yield str(value)


def _signature(tool: Mapping[str, Any]) -> Iterator[str]:
    """The name of a tool's function and of its parameters."""
    function = tool["function"]
    yield function["name"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    yield from properties if isinstance(properties, Mapping) else ()
