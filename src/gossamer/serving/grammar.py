"""Answers that satisfy a JSON schema: which tokens may come next, through llguidance."""

import json
import re
import subprocess
import sys
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gossamer.errors import StateError, UnsupportedError, UsageError

DEEPEST = 64
"""Levels of a schema."""
SECONDS = 1
"""Of a processor, for what a schema takes to be made ready."""
_BYTES = 2**31
_PATIENCE = 10.0
_BOUNDS: dict[str, Any] = {"initial_lexer_fuel": 500_000, "max_grammar_size": 100_000, "max_lexer_states": 50_000}
_LAYOUT = {"whitespace_pattern": r"[ \n]{0,40}"}
"""Between the parts of an answer: enough for any layout, not so much that a model could go on with it for ever."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_TOKENIZERS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_TRIAL = """
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
except (ImportError, ValueError, OSError):
    pass
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
try:
    grammar = LLMatcher.grammar_from_json_schema(sys.stdin.read(), overrides=LAYOUT)
    limits = LLParserLimits(**BOUNDS, verbose_errors=False)
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    matcher.is_error() or matcher.compute_bitmask()
    said = matcher.get_error() if matcher.is_error() else ""
    del matcher, grammar
except ValueError as error:
    said = str(error) or "no schema"
sys.stdout.write(json.dumps(said))
"""


class Grammar:
    """Follows one answer through a schema.

    Args:
        schema: a JSON schema as text, or "json" for any object.
        tokenizer: a fast one of transformers; what llguidance makes of it is made once.

    Raises: UsageError for a schema that is none, is too deep, or takes too much to follow; UnsupportedError without
        llguidance or a fast tokenizer.
    """

    def __init__(self, schema: str, tokenizer: Any) -> None:
        checked = check_schema(schema)
        from llguidance import LLMatcher, LLParserLimits

        grammar = LLMatcher.grammar_from_json_schema(checked, overrides=_LAYOUT)  # pyright: ignore[reportArgumentType]
        limits = LLParserLimits(**_BOUNDS, verbose_errors=False)
        self.matcher = LLMatcher(_prepared(tokenizer), grammar, log_level=0, limits=limits)
        if self.matcher.is_error():
            raise _refusal(self.matcher.get_error())

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


def check_schema(schema: str) -> str:
    """The schema, "json" spelt out. One that was not seen before is tried in a process that is ended if it takes long.

    May be called from any thread, before a `Grammar` is made where nothing may wait.

    Raises: what `Grammar` raises for a schema.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise UnsupportedError("schemas need llguidance", hint="pip install 'gossamer[serve]'") from None
    if schema == "json":
        return '{"type": "object"}'
    depth = deepest = 0
    for letter in _STRING.sub("", schema):
        depth += (letter in "[{") - (letter in "]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise UsageError("a JSON schema that is too deep", where="schema", expected=f"at most {DEEPEST} levels")
    try:
        value = json.loads(schema)
        schema.encode()
    except ValueError as error:
        raise UsageError("a schema that is no JSON", where="schema", got=str(error)[:200]) from None
    if not isinstance(value, dict):
        raise UsageError("a JSON schema is an object", where="schema", got=type(value).__name__)
    if said := _tried(schema):
        raise _refusal(said)
    return schema


@lru_cache(maxsize=256)
def _tried(schema: str) -> str:
    """What another process says against the schema; nothing if it can be followed."""
    known = {"SECONDS": SECONDS, "BYTES": _BYTES, "LAYOUT": _LAYOUT, "BOUNDS": _BOUNDS}
    program = "".join(f"{name} = {value!r}\n" for name, value in known.items()) + _TRIAL
    command = [sys.executable, "-c", program]
    try:
        ended = subprocess.run(command, input=schema.encode(), capture_output=True, timeout=_PATIENCE, check=False)
        return json.loads(ended.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # it was ended before it could say anything
        return "it takes too long or too much memory"


def _refusal(said: str) -> UsageError:
    return UsageError("a JSON schema that cannot be followed", where="schema", got=said.partition("\n")[0][:200])


def _prepared(tokenizer: Any) -> Any:
    from llguidance import hf

    if tokenizer not in _TOKENIZERS:
        try:
            _TOKENIZERS[tokenizer] = hf.from_tokenizer(tokenizer)
        except ValueError as error:
            raise UnsupportedError("schemas need a fast tokenizer", got=str(error)) from None
    return _TOKENIZERS[tokenizer]
