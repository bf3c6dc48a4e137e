"""From a row to the text a model sees, cut where learning starts and stops.

    messages, one chat template:    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   Hello!<|im_end|>
                                    |----------------- prompt, not learned ----------------|   |--- learned --|

The cut needs no `{% generation %}` marks in the template. What stands before a turn is what the template renders for
the turns before it plus the generation prompt: exactly what the model is given when it is to answer. The whole chat
must begin with that text and go on with the turn's text and an end-of-turn token. If it does not, because the template
strips or rewrites turns, the row is refused: a mask for it would be a guess.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from gossamer.errors import DataError
from gossamer.training.formats import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Piece(NamedTuple):
    """A stretch of text that is learned as a whole or not at all.

    A learned piece ends with the token `end` (`""` where none is asked for).
    """

    text: str
    supervised: bool = False
    end: str = ""


class Unprovable(ValueError):
    """The reason why no mask can be proven right for a row."""


class Writer:
    """Writes rows as pieces, the way one tokenizer wants them.

    Args:
        tokenizer: any transformers tokenizer; its sandbox renders the chat template.
        add_eos: end completions and plain texts with the tokenizer's EOS. Chats end as their template says.
        chat_template: use the tokenizer's template where a row has a plain form too (Alpaca).

    Raises `DataError` if EOS is asked for and the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, add_eos: bool = True, chat_template: bool = True) -> None:
        self.tokenizer = tokenizer
        self.templated = chat_template and bool(tokenizer.chat_template)
        self.eos = str(tokenizer.eos_token or "") if add_eos else ""
        if add_eos and not self.eos:
            raise DataError("the tokenizer has no EOS token, so the model could not learn where to stop",
                            hint="set tokenizer.eos_token, or add_eos=False")  # fmt: skip
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        ends = special - {str(tokenizer.bos_token)} | {str(tokenizer.eos_token or "")} - {""}
        self.end_of_turn = re.compile(rf"\s*({'|'.join(sorted(map(re.escape, ends), key=len, reverse=True))})")

    def is_chat(self, row: Row) -> bool:
        """Whether the chat template writes this row, with whatever comes first; other rows begin with the BOS."""
        return bool(row.turns) and (self.templated or not row.completion)

    def pieces(self, row: Row) -> list[Piece]:
        """The row as text, in order. Raises `Unprovable` where it cannot be told what is to be learned."""
        if self.is_chat(row):
            return self._chat(row)
        answer = row.completion or row.text
        if self.eos and self.eos in answer:
            raise Unprovable(f"the text itself holds the end token {self.eos!r}")
        learned = Piece(answer + self.eos, True, self.eos)
        return [Piece(row.prompt), learned] if row.completion else [learned]

    def _chat(self, row: Row) -> list[Piece]:
        """The turns up to the last learned one; what comes later could not change what is learned."""
        if not self.templated:
            raise Unprovable("the row is a chat, but the tokenizer has no chat template in use")
        learned = [index for index, turn in enumerate(row.turns) if turn.supervised]
        whole = self._render(row, learned[-1] + 1)
        pieces: list[Piece] = []
        position = 0
        for index in learned:
            head = self._render(row, index, generation_prompt=True)
            if not whole.startswith(head) or len(head) < position:
                raise Unprovable(f"turn {index + 1}: the chat template rewrites the turns before it once it is there")
            answer = self._answer(whole, len(head), row.turns[index].text, index + 1)
            pieces += [Piece(whole[position : len(head)]), answer]
            position = len(head) + len(answer.text)
        return pieces

    def _answer(self, whole: str, start: int, text: str, number: int) -> Piece:
        """The assistant's text with its end-of-turn token. White space around it is the template's affair."""
        stripped = text.strip()
        begin = start + len(whole[start:]) - len(whole[start:].lstrip())
        if not whole.startswith(stripped, begin):
            raise Unprovable(f"turn {number}: the chat template rewrites the assistant's text; "
                             f"expected {stripped!r:.60}, got {whole[start:]!r:.60}")  # fmt: skip
        end = self.end_of_turn.match(whole, begin + len(stripped))
        if not end:
            raise Unprovable(f"turn {number}: no end-of-turn token follows the assistant's text, but "
                             f"{whole[begin + len(stripped) :]!r:.60}")  # fmt: skip
        if end[1] in text:
            raise Unprovable(f"turn {number}: the text itself holds the end-of-turn token {end[1]!r}")
        return Piece(whole[start : end.end()], True, end[1])

    def _render(self, row: Row, count: int, *, generation_prompt: bool = False) -> str:
        """The first `count` turns as the tokenizer's chat template writes them."""
        from jinja2 import TemplateError

        messages = [{"role": turn.role, "content": turn.text} for turn in row.turns[:count]]
        write = self.tokenizer.apply_chat_template
        try:
            return str(write(messages, tokenize=False, add_generation_prompt=generation_prompt))
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise Unprovable(f"the chat template refuses the first {count} turns: {error!s:.200}") from None
