"""What each token of an answer spells, in its place: joined, the texts of all tokens are the answer's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gossamer.serving.detokenizer import BROKEN, special_of
from gossamer.serving.vocabulary import BYTE, raw_bytes


@dataclass
class Spelled:
    r"""A token in words.

    Attributes:
        text: of an answer's token what it adds to the text: nothing for the first bytes of a character, which stands
            with its last. Of another that was likely in the place: its own, or `bytes:\\xe2` where it is not a whole
            character. A special token has its own text, which is no part of the answer's.
        raw: its bytes; joined, those of an answer's tokens are its text in UTF-8. None for a special token.
        offset: where in the answer's text it begins.
    """

    text: str
    raw: bytes | None
    offset: int = 0


class Spelling:
    """Spells the tokens of one answer as they come.

    Args:
        tokenizer: one of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.special = tokenizer, special_of(tokenizer)
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self.letters = 0
        self.before: int | None = None
        self.labels: dict[tuple[int | None, int], Spelled] = {}

    def add(self, token: int, others: Sequence[int] = ()) -> tuple[Spelled, list[Spelled]]:
        """An answer's next token, and those that were likely in its place, which may be itself among them."""
        label, listed = self._label(token), [self._label(one) for one in others]
        if label.raw is None:
            return replace(label, offset=self.letters), listed
        spelled = replace(label, text=self.bytes.decode(label.raw), offset=self.letters)
        self.letters += len(spelled.text)
        self.before = token
        return spelled, listed

    def end(self, last: Spelled) -> None:
        """No token follows: an unfinished character stands with the last one."""
        if last.raw is not None:
            last.text += self.bytes.decode(b"", final=True)

    def _label(self, token: int) -> Spelled:
        """What a token spells behind the one that is before it, and nothing of what that one began."""
        key = (self.before, token)
        if key not in self.labels:
            self.labels[key] = self._labelled(*key)
        return self.labels[key]

    def _labelled(self, before: int | None, token: int) -> Spelled:
        if (special := self.special.get(token)) is not None:
            return Spelled(special, None)
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if (isinstance(piece, str) and BYTE.fullmatch(piece)) or BROKEN in self._decoded(token):
            raw = raw_bytes(self.tokenizer, token)
            if raw is not None:
                try:
                    return Spelled(raw.decode(), raw)
                except UnicodeDecodeError:
                    return Spelled("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)
        if before is None:
            text = self._decoded(token)
        else:  # vocabularies like sentencepiece's lose the space of a first word
            text = self._decoded(before, token).removeprefix(self._decoded(before))
        return Spelled(text, text.encode())

    def _decoded(self, *tokens: int) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
