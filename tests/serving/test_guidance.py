"""Answers that follow a schema, from a model that knows nothing of it; schemas that are meant to hurt."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
import torch

from gossamer.errors import StateError, UnsupportedError, UsageError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving import Engine
from gossamer.serving.guidance import Guide

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def check(value: Any) -> None:
    assert {*value} == {"name", "age", "kind"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 5
    assert 0 <= value["age"] <= 99
    assert value["kind"] in ("cat", "dog")


@pytest.mark.parametrize("seed", range(6))
def test_a_model_with_random_weights_answers_by_the_schema(seed: int) -> None:
    with Engine((tiny("llama"), tiny_tokenizer())) as engine:
        options: dict[str, Any] = {"max_tokens": 250, "temperature": float(seed > 0), "seed": seed}
        replies = [*engine.generate(["x", "x"], **options, schema=json.dumps(PERSON))]
        (free,) = engine.generate(["x"], **options)
    for reply in replies:
        assert reply.finish == "stop"
        check(json.loads(reply.text))
    assert free.text != replies[0].text


def test_several_at_once_do_not_disturb_each_other() -> None:
    with Engine((tiny("llama"), tiny_tokenizer())) as engine:
        replies = [*engine.generate(["a", "b", "c"], max_tokens=200, temperature=1.0, schema=json.dumps(PERSON))]
    for reply in replies:
        check(json.loads(reply.text))


def test_any_object() -> None:
    guide = Guide("json", tiny_tokenizer())
    logits = torch.zeros(len(tiny_tokenizer()) + 8)
    guide.mask(logits)
    allowed = [tiny_tokenizer().decode([token]) for token in torch.nonzero(logits == 0).flatten().tolist()]
    assert allowed
    assert all(one.strip().startswith("{") for one in allowed if one.strip())
    assert bool((logits[-8:] == -torch.inf).all())  # rows beyond the vocabulary
    with pytest.raises(StateError, match="cannot follow"):
        guide.advance(tiny_tokenizer()("q")["input_ids"][-1])


BAD = {
    "no JSON": "{",
    "no object": "[1]",
    "deep": '{"a":' * 100 + "1" + "}" * 100,
    "unknown reference": '{"$ref": "#/$defs/none"}',
    "remote reference": '{"$ref": "http://example.com/schema.json"}',
    "no such type": '{"type": "cat"}',
    "regex bomb": json.dumps({"type": "string", "pattern": "^(((a{1,200}){1,200}){1,200}){1,200}$"}),
    "many numbers": json.dumps({"type": "array", "items": {"type": "string"}, "minItems": 10**9}),
}


@pytest.mark.parametrize("bad", BAD)
def test_schemas_that_hurt_end_soon_in_an_error_with_a_name(bad: str) -> None:
    Guide("json", tiny_tokenizer())  # the tokenizer is made ready once
    start = time.monotonic()
    try:
        followed(Guide(BAD[bad], tiny_tokenizer()), 50)
    except (UsageError, StateError) as error:
        assert "schema" in str(error)
    else:
        assert bad in ("regex bomb", "many numbers")  # what can be followed within bounds does no harm
    assert time.monotonic() - start < 2


def followed(guide: Guide, steps: int) -> None:
    for _ in range(steps):
        logits = torch.zeros(len(tiny_tokenizer()))
        guide.mask(logits)
        guide.advance(int(logits.argmax()))


@pytest.mark.parametrize(
    "bad", ["no JSON", "no object", "deep", "unknown reference", "remote reference", "no such type"]
)
def test_schemas_that_are_none_are_refused_before_they_wait(bad: str) -> None:
    with Engine((tiny("llama"), tiny_tokenizer())) as engine:
        with pytest.raises(UsageError, match="schema"):
            next(engine.generate(["x"], schema=BAD[bad]))
        assert not engine.busy


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match="llguidance"):
        Guide("json", tiny_tokenizer())
