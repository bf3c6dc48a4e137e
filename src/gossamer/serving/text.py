"""Text from tokens as they come: never half a character, never what could still be the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"
"""What bytes that are no whole character decode to."""


class Writer:
    """Turns the tokens of one answer into text.

    Args:
        stop: texts that end it, and are not part of it.

    Attributes:
        text: what is certain so far. After `end` it is what the tokenizer makes of all tokens, special ones left out,
            up to the first stop text; where bytes make no character, a tokenizer may write those before them otherwise.
        stopped: a stop text came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.first = self.after = 0  # tokens from `first` on are decoded together; those before `after` are written
        self.text = self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; gives the text that is newly certain."""
        self.tokens.append(token)
        return self._take(self._fresh(whole=False))

    def end(self) -> str:
        """No token follows; gives the rest."""
        rest = "" if self.stopped else self._take(self._fresh(whole=True)) + self.held
        if not self.stopped:
            self.text += self.held
        self.held = ""
        return rest

    def _fresh(self, whole: bool) -> str:
        """Decoded with the piece before it, as a tokenizer may write a token otherwise at the start of a text."""
        known = self._decoded(self.tokens[self.first : self.after])
        text = self._decoded(self.tokens[self.first :])
        if len(text) <= len(known) or (text.endswith(_BROKEN) and not whole):
            return ""
        self.first, self.after = self.after, len(self.tokens)
        return text[len(known) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _take(self, fresh: str) -> str:
        if self.stopped:
            return ""
        self.held += fresh
        found = [self.held.index(one) for one in self.stop if one in self.held]
        if found:
            certain, self.held, self.stopped = self.held[: min(found)], "", True
        else:
            kept = max((_overlap(self.held, one) for one in self.stop), default=0)
            certain, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of the text begin the stop text."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
