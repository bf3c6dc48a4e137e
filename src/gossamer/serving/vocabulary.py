"""Which rows of a model's head stand for tokens, what a token spells, and texts as their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gossamer.errors import UsageError

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token that is one byte of a character, in vocabularies like sentencepiece's."""
_KNOWN: WeakKeyDictionary[Any, tuple[Any, Vocabulary]] = WeakKeyDictionary()


class Vocabulary:
    """The tokens that a model may draw: those that its tokenizer has, and those that end an answer.

    Heads are often padded to a round number of rows, and vocabularies have holes: the rows beside the tokens were never
    trained, have no text, and are as likely as any other.

    Args:
        rows: of the head. ends: end-of-sequence tokens.

    Attributes:
        width: logits that are looked at: up to the last token's. holes: (N,) ids below it that are no tokens.
    """

    def __init__(self, tokenizer: Any, rows: int, ends: Iterable[int] = ()) -> None:
        known = {token for token in {*tokenizer.get_vocab().values(), *ends} if 0 <= token < rows}
        self.width = max(known, default=-1) + 1
        self.holes = torch.tensor(sorted({*range(self.width)} - known), dtype=torch.long)
        self._holes = frozenset(self.holes.tolist())

    def __contains__(self, token: int) -> bool:
        return 0 <= token < self.width and token not in self._holes

    def check(self, tokens: Iterable[int], where: str) -> None:
        """Raise `UsageError` for ids that are no tokens."""
        for token in tokens:
            if token not in self:
                raise UsageError("no such token", where=where, got=str(token), expected=self.range)

    @property
    def range(self) -> str:
        """Its ids, in words."""
        return f"token ids 0 to {self.width - 1:,}" + (" that the tokenizer has" if self._holes else "")

    def drawable(self, logits: Tensor) -> Tensor:
        """Of logits (..., rows) those of tokens: (..., width), with -inf at holes. A view where there are none."""
        kept = logits[..., : self.width]
        return kept.index_fill(-1, self.holes.to(kept.device), -torch.inf) if self._holes else kept


def vocabulary_of(model: Any, tokenizer: Any) -> Vocabulary:
    """Of a model with its tokenizer; made again once either has grown."""
    rows = model.config.get_text_config().vocab_size
    ends = ends_of(model, tokenizer)
    state = (rows, len(tokenizer), ends)
    if tokenizer not in _KNOWN or _KNOWN[tokenizer][0] != state:
        _KNOWN[tokenizer] = state, Vocabulary(tokenizer, rows, ends)
    return _KNOWN[tokenizer][1]


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the model's own and the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    return frozenset({*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None})


def encoded(tokenizer: Any, text: str, special: bool = True) -> tuple[int, ...]:
    """Token ids of a text, with what the tokenizer puts around texts if `special`.

    A text that was rendered before and begins with the beginning-of-sequence token gets no second one.
    """
    ids = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
    first = tokenizer.bos_token_id
    twice = special and first is not None and ids[:2] == (first, first)
    if twice and tokenizer(text[:256], add_special_tokens=False)["input_ids"][:1] == [first]:
        return ids[1:]
    return ids


def texts(given: Any, where: str) -> list[str]:
    """The texts that were given: a text alone is one, not its letters. Raises `UsageError` for what is no text."""
    listed: list[Any]
    try:
        listed = [given] if isinstance(given, str | bytes | dict) else [*given]
    except TypeError:
        listed = [given]
    for number, one in enumerate(listed):
        if not isinstance(one, str):
            got = type(one).__name__
            raise UsageError("a prompt is a text", where=f"{where}[{number}]", got=got, expected="str")
    return listed


def raw_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a token that need not be whole characters; None where its vocabulary does not spell bytes."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return None
    if one := BYTE.fullmatch(piece):
        return bytes([int(one[1], 16)])
    try:
        return bytes(_LETTERS[letter] for letter in piece)
    except KeyError:
        return None


def _letters() -> dict[str, int]:
    """Letter -> byte, as byte-level vocabularies write bytes: those that print as they are, others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


_LETTERS = _letters()
