"""Text from tokens as they come: never half a character, never what could still be the beginning of a stop text."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from gossamer.serving.vocabulary import BYTE, raw_bytes

BROKEN = "\ufffd"
"""What bytes that are no whole character decode to."""
_LONG, _KEPT = 32, 16
_SURE = 4
"""No character has more bytes; so many characters before it, and it lies whole within the window."""
_SPECIAL: WeakKeyDictionary[Any, tuple[int, dict[int, str]]] = WeakKeyDictionary()


class Detokenizer:
    """Turns the tokens of one answer into text.

        text = decode(tokens without special ones), up to the first stop text

    Stop texts are looked for where special tokens stand by their own text, which is left out: `</s>` may be one.

    Only a window of the last tokens is decoded when one comes, so that the work for each does not grow. Tokens that
    stand for single bytes wait for one that does not: a vocabulary like sentencepiece's decodes a run of bytes as a
    whole.

    Args:
        tokenizer: one of transformers.
        stop: texts that end it, or one, and are not part of it.

    Attributes:
        text: what is certain so far.
        stopped: a stop text came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, (stop,) if isinstance(stop, str) else tuple(stop)
        self.special = special_of(tokenizer)
        self.window: list[int] = []
        self.passed = 0  # characters of the decoded window that were passed on
        self.text = self.held = ""
        self.silent: list[tuple[int, int]] = []  # where in what is held the texts of special tokens stand
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; gives the text that is newly certain."""
        if self.stopped:
            return ""
        if token in self.special:
            return self._add_special(self.special[token]) if self.stop else ""
        self.window.append(token)
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and BYTE.fullmatch(piece):
            return ""
        return self._take(self._fresh())

    def end(self) -> str:
        """No token follows; gives the rest."""
        if self.stopped:
            return ""
        rest = self._take(self._decoded(self.window)[self.passed :])
        held = self._shown(len(self.held))
        self.held, self.silent, self.window, self.passed = "", [], [], 0
        self.text += held
        return rest + held

    def _fresh(self) -> str:
        """What of the window became certain."""
        text = self._decoded(self.window)
        certain = _certain(text)
        fresh, self.passed = text[self.passed : certain], max(self.passed, certain)
        if len(self.window) > _LONG:
            self._slide()
        return fresh

    def _add_special(self, name: str) -> str:
        """A special token: what stands before it, and its text for the stop texts alone."""
        before = self._take(self._fresh() if self.window else "")
        if self.stopped:
            return before
        self.silent.append((len(self.held), len(self.held) + len(name)))
        return before + self._take(name)

    def _slide(self) -> None:
        """Forget the oldest tokens of the window, unless an unfinished character might have begun there."""
        kept = self.window[-_KEPT:]
        certain = _certain(self._decoded(kept))
        if certain >= _SURE:
            self.window, self.passed = kept, certain

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _take(self, fresh: str) -> str:
        self.held += fresh
        found = [self.held.index(one) for one in self.stop if one in self.held]
        if found:
            certain, self.held, self.stopped = self._shown(min(found)), "", True
        else:
            end = len(self.held) - max((_overlap(self.held, one) for one in self.stop), default=0)
            certain, self.held = self._shown(end), self.held[end:]
            self.silent = [(max(first - end, 0), last - end) for first, last in self.silent if last > end]
        self.text += certain
        return certain

    def _shown(self, end: int) -> str:
        """What is held up to a place, without the texts of special tokens."""
        shown, at = "", 0
        for first, last in self.silent:
            shown += self.held[at : min(first, end)]
            at = last
        return shown + self.held[at:end]


def _certain(text: str) -> int:
    """How many characters no further token changes: an unfinished one at the end decodes to a single sign."""
    return len(text) - text.endswith(BROKEN)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of the text begin the stop text."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def special_of(tokenizer: Any) -> dict[int, str]:
    """The special tokens, which are no part of a text, with their own texts."""
    size = len(tokenizer)
    if tokenizer not in _SPECIAL or _SPECIAL[tokenizer][0] != size:
        added = {token: about.content for token, about in tokenizer.added_tokens_decoder.items() if about.special}
        others = {token: tokenizer.convert_ids_to_tokens(token) for token in tokenizer.all_special_ids}
        _SPECIAL[tokenizer] = size, others | added
    return _SPECIAL[tokenizer][1]


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
