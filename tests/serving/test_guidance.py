"""Answers that satisfy their schema whatever the model says; schemas that are meant to do harm."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch

from gossamer.errors import GossamerError, StateError, UsageError
from gossamer.models import tiny_tokenizer
from gossamer.serving.grammar import Grammar, check_schema
from gossamer.serving.sampling import Sampler, Sampling

TOKENIZER = tiny_tokenizer()
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}


def answer(schema: str, seed: int, most: int = 400) -> tuple[str, bool]:
    """What random logits say under a schema, and whether they came to its end."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(Sampling(temperature=1.0, seed=seed, schema=schema), [], Grammar(schema, TOKENIZER))
    tokens: list[int] = []
    while not sampler.done and len(tokens) < most:
        tokens.append(sampler.draw(torch.randn(330, generator=generator)).token)  # more rows than tokens
        sampler.seen(tokens[-1])
    return TOKENIZER.decode(tokens, skip_special_tokens=True), sampler.done


@pytest.mark.parametrize("seed", range(8))
def test_answers_satisfy_their_schema(seed: int) -> None:
    text, done = answer(json.dumps(PERSON), seed)
    assert done
    value = json.loads(text)
    assert {*value} == {"age", "kind"}
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 120
    assert value["kind"] in ("cat", "dog")


def test_a_list_holds_what_it_should() -> None:
    schema = json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3})
    for seed in range(4):
        text, done = answer(schema, seed)
        value = json.loads(text)
        assert done
        assert 2 <= len(value) <= 3
        assert all(type(one) is bool for one in value)


def test_json_is_any_object() -> None:
    done = [text for text, done in (answer("json", seed) for seed in range(6)) if done]
    assert done
    assert all(isinstance(json.loads(text), dict) for text in done)


def test_a_token_that_may_not_come_is_refused() -> None:
    guide = Grammar(json.dumps(PERSON), TOKENIZER)
    with pytest.raises(StateError, match="schema"):
        guide.advance(ord("x"))


def test_no_layout_goes_on_for_ever() -> None:
    guide, (blank,) = Grammar("json", TOKENIZER), TOKENIZER(" ")["input_ids"]
    guide.advance(TOKENIZER("{")["input_ids"][0])
    for _ in range(60):
        logits = torch.zeros(320)
        guide.mask(logits)
        if logits[blank] == -torch.inf:
            return
        guide.advance(blank)
    pytest.fail("blanks may follow each other without end")


def nested(levels: int) -> Any:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "string"}


def chain(count: int) -> dict[str, Any]:
    links = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(count)}
    return {"$defs": links | {f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}


REFUSED = {
    "no JSON": "{",
    "no object": "[1]",
    "not a number": '{"minimum": NaN}',
    "half a character": '{"const": "\ud800"}',
    "half a character, escaped": '{"const": "\\ud800"}',
    "deep": json.dumps(nested(70)),
    "deep, brackets in strings": '{"const": [' + '"]]]]]]]]", [' * 2000 + "]" * 2001 + "}",
    "itself": '{"$ref": "#"}',
    "a circle": '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}',
    "a file": '{"$ref": "file:///etc/passwd"}',
    "a page": '{"$ref": "http://example.com/x.json"}',
    "unknown type": '{"type": "nothing"}',
    "what it cannot do": '{"not": {}}',
    "patterns that exclude each other": json.dumps(
        {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{30}}"} for i in range(26)]}
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_followed_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Grammar(REFUSED[name], TOKENIZER)


FOLLOWED = {
    "huge": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1500)}},
    "long": {"type": "array", "items": nested(3), "minItems": 10**6},
    "repeated": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "doubled": chain(40),
    "many": {"type": "string", "pattern": "|".join(f"a{{{i}}}b.*c" for i in range(3000))},
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_monstrous_schema_is_followed_or_refused(name: str) -> None:
    with contextlib.suppress(GossamerError):  # and no other error
        answer(json.dumps(FOLLOWED[name]), 0, most=40)


def test_a_schema_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = json.dumps(PERSON | {"title": "tried once"})
    check_schema(schema)
    monkeypatch.setattr("subprocess.run", None)
    assert check_schema(schema) == schema
