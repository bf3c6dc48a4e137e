"""Text from tokens as they come: never half a character, never what could still be the beginning of a stop text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

_BROKEN = "\ufffd"
"""What bytes that are no whole character decode to."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that is one byte of a character, in vocabularies like sentencepiece's."""
_LONG, _KEPT = 32, 16
_SURE = 4
"""No character has more bytes; so many characters before it, and it lies whole within the window."""
_SPECIAL: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


class Writer:
    """Turns the tokens of one answer into text.

        text = decode(tokens without special ones), up to the first stop text

    Only a window of the last tokens is decoded when one comes, so that the work for each does not grow. Tokens that
    stand for single bytes wait for one that does not: a vocabulary like sentencepiece's decodes a run of bytes as a
    whole.

    Args:
        tokenizer: one of transformers.
        stop: texts that end it, and are not part of it.

    Attributes:
        text: what is certain so far.
        stopped: a stop text came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.special = _special(tokenizer)
        self.window: list[int] = []
        self.told = 0
        """Characters of the decoded window that were passed on."""
        self.text = self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; gives the text that is newly certain."""
        if self.stopped or token in self.special:
            return ""
        self.window.append(token)
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and _BYTE.fullmatch(piece):
            return ""
        text = self._decoded(self.window)
        certain = _certain(text)
        fresh, self.told = text[self.told : certain], max(self.told, certain)
        if len(self.window) > _LONG:
            self._slide()
        return self._take(fresh)

    def end(self) -> str:
        """No token follows; gives the rest."""
        if self.stopped:
            return ""
        rest = self._take(self._decoded(self.window)[self.told :])
        held, self.held, self.window, self.told = self.held, "", [], 0
        self.text += held
        return rest + held

    def _slide(self) -> None:
        """Forget the oldest tokens of the window, unless an unfinished character might have begun there."""
        kept = self.window[-_KEPT:]
        certain = _certain(self._decoded(kept))
        if certain >= _SURE:
            self.window, self.told = kept, certain

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _take(self, fresh: str) -> str:
        self.held += fresh
        found = [self.held.index(one) for one in self.stop if one in self.held]
        if found:
            certain, self.held, self.stopped = self.held[: min(found)], "", True
        else:
            kept = max((_overlap(self.held, one) for one in self.stop), default=0)
            certain, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        self.text += certain
        return certain


def _certain(text: str) -> int:
    """How many characters no further token changes: an unfinished one at the end decodes to a single sign."""
    return len(text) - text.endswith(_BROKEN)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of the text begin the stop text."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _special(tokenizer: Any) -> frozenset[int]:
    if tokenizer not in _SPECIAL:
        added = {token for token, about in tokenizer.added_tokens_decoder.items() if about.special}
        _SPECIAL[tokenizer] = frozenset(added | {*tokenizer.all_special_ids})
    return _SPECIAL[tokenizer]
