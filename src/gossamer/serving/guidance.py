"""Answers that satisfy a JSON schema: which tokens may come next, through llguidance."""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gossamer.errors import StateError, UnsupportedError, UsageError

DEEPEST = 64
"""Levels of a schema."""
_BOUNDS = {"initial_lexer_fuel": 500_000, "max_grammar_size": 100_000, "max_lexer_states": 50_000}
_WRITING: Any = {"whitespace_pattern": r"[ \t\n\r]{0,16}"}  # without a bound some models write blanks for ever
_TOKENIZERS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class Guide:
    """Follows one answer through a schema.

    Args:
        schema: a JSON schema as text, or "json" for any object.
        tokenizer: a fast one of transformers; what llguidance makes of it is made once.

    Raises: UsageError for a schema that is none, is too deep, or takes too much to follow; UnsupportedError without
        llguidance or a fast tokenizer.
    """

    def __init__(self, schema: str, tokenizer: Any) -> None:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise UnsupportedError("schemas need llguidance", hint="pip install 'gossamer[serve]'") from None
        grammar = LLMatcher.grammar_from_json_schema(_checked(schema), defaults=_WRITING)
        limits = LLParserLimits(**_BOUNDS, verbose_errors=False)
        self.matcher = LLMatcher(_prepared(tokenizer), grammar, log_level=0, limits=limits)
        if self.matcher.is_error():
            said = self.matcher.get_error().partition("\n")[0][:200]
            raise UsageError("a JSON schema that cannot be followed", where="schema", got=said)

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return bool(self.matcher.is_stopped())

    def mask(self, logits: Tensor) -> None:
        """Give -inf to what may not come next, in place. Raises `StateError` when the schema takes too much."""
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        allowed = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten().bool()
        known = min(len(allowed), len(logits))  # a model may have more rows than its tokenizer has tokens
        logits[:known].masked_fill_(~allowed[:known], -torch.inf)
        logits[known:] = -torch.inf

    def advance(self, token: int) -> None:
        """A token was drawn. Raises `StateError` for one that may not come here."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            said = self.matcher.get_error().partition("\n")[0][:200]
            raise StateError("the answer cannot follow its schema any further", got=said)


def _checked(schema: str) -> str:
    """The schema as text of bounded depth."""
    if schema == "json":
        return '{"type": "object"}'
    depth = deepest = 0
    for letter in schema:  # brackets within strings count too: a bound, not a parser
        depth += (letter in "[{") - (letter in "]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise UsageError("a JSON schema that is too deep", where="schema", expected=f"at most {DEEPEST} levels")
    try:
        value = json.loads(schema)
    except ValueError as error:
        raise UsageError("a schema that is no JSON", where="schema", got=str(error)) from None
    if not isinstance(value, dict):
        raise UsageError("a JSON schema is an object", where="schema", got=type(value).__name__)
    return schema


def _prepared(tokenizer: Any) -> Any:
    from llguidance import hf

    if tokenizer not in _TOKENIZERS:
        try:
            _TOKENIZERS[tokenizer] = hf.from_tokenizer(tokenizer)
        except ValueError as error:
            raise UnsupportedError("schemas need a fast tokenizer", got=str(error)) from None
    return _TOKENIZERS[tokenizer]
