"""Answers over HTTP are the engine's own, in OpenAI's shapes, and name the adapters that made them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

import gossamer as gs
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving.api.app import create_app
from gossamer.serving.api.backends import Vectors
from gossamer.serving.embedding import Embedder
from tests.serving.api.conftest import engine

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
ASKED = [{"model": "toy"}, {"model": "sql"}, {"model": "toy:french"}]
MIX = {"model": "toy", "lora": [{"id": "sql", "scale": 0.5}, {"id": "french", "scale": 0.25}]}
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def alone(learned: dict[str, gs.Adapter], prompt: str, adapter: Any) -> str:
    with engine(learned) as made:
        [reply] = made.generate([prompt], [adapter], max_tokens=6, ignore_eos=True)
        return reply.text


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("asked", "adapter"),
    [(ASKED[0], None), (ASKED[1], "sql"), (ASKED[2], "french"), (MIX, {"sql": 0.5, "french": 0.25})],
)
def test_an_answer_is_the_engines_and_names_its_adapters(
    client: TestClient, learned: dict[str, gs.Adapter], asked: dict[str, Any], adapter: Any
) -> None:
    answer = client.post("/v1/completions", json=asked | GREEDY | {"prompt": "SELECT"})
    body = answer.json()
    assert answer.status_code == 200
    assert Completion.model_validate(body).choices[0].text == alone(learned, "SELECT", adapter)
    scales = {adapter: 1.0} if isinstance(adapter, str) else adapter or {}
    named = [{"id": name, "scale": scale, "digest": learned[name].digest} for name, scale in scales.items()]
    assert body["gossamer"]["adapters"] == named
    header = ", ".join(f"{one['id']}=sha256:{one['digest']}" for one in named)
    assert answer.headers["x-gossamer-adapter"] == (header or "none")
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 6


def numbers(choice: dict[str, Any], chat: bool) -> list[float]:
    """Logarithms of the tokens and of the likeliest in their places; the same but for rounding."""
    logprobs = choice["logprobs"]
    if not chat:
        assert all(len(top) <= 2 for top in logprobs["top_logprobs"])
        return logprobs["token_logprobs"]
    entries = logprobs["content"]
    return [one["logprob"] for entry in entries for one in (entry, *entry["top_logprobs"])]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("asked", [ASKED[1], MIX])
def test_a_stream_is_the_whole_in_pieces(client: TestClient, path: str, asked: dict[str, Any]) -> None:
    chat = "chat" in path
    body = asked | GREEDY | (CHAT if chat else {"prompt": ["ab", "cde"]}) | {"n": 2, "temperature": 0.7, "seed": 5}
    body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    whole = client.post(path, json=body).json()
    pieces = events(client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text)
    usage = pieces.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert {piece["id"] for piece in pieces} == {usage["id"]}
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        parts = [piece["choices"][0] for piece in mine]
        text = "".join(part["delta"]["content"] if chat else part["text"] for part in parts)
        assert text == (choice["message"]["content"] if chat else choice["text"])
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert mine[0]["gossamer"] == mine[-1]["gossamer"] == whole["gossamer"]
        assert [one for part in parts for one in numbers(part, chat)] == pytest.approx(numbers(choice, chat), abs=1e-4)
    for piece in [*pieces, usage]:
        for choice in () if chat else piece["choices"]:
            choice["finish_reason"] = "stop"  # null in OpenAI's own streams too, though not in their type
        (ChatCompletionChunk if chat else Completion).model_validate(piece)
    (ChatCompletion if chat else Completion).model_validate(whole)


def test_several_prompts_and_token_ids(client: TestClient) -> None:
    ids = [client.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in ("ab", "cde")]
    by_text = client.post("/v1/completions", json=ASKED[1] | GREEDY | {"prompt": ["ab", "cde"]}).json()
    by_ids = client.post("/v1/completions", json=ASKED[1] | GREEDY | {"prompt": ids}).json()
    assert by_text["choices"] == by_ids["choices"]
    assert client.post("/detokenize", json={"tokens": ids[1]}).json() == {"prompt": "cde"}


def test_a_seed_repeats_and_its_sequences_differ(client: TestClient) -> None:
    body = {"model": "toy", "prompt": "abc", "n": 4, "seed": 3, "max_tokens": 12, "temperature": 1.5}
    first, again = (client.post("/v1/completions", json=body).json()["choices"] for _ in range(2))
    assert first == again
    assert len({choice["text"] for choice in first}) == 4
    del body["seed"]
    fresh = [client.post("/v1/completions", json=body).json()["choices"] for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_logprobs_are_finite_json(client: TestClient) -> None:
    body = {"model": "sql", "temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 3} | CHAT
    entries = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    for entry in entries:
        tops = [one["logprob"] for one in entry["top_logprobs"]]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert entry["logprob"] == tops[0] <= 0


def test_stop_texts_end_an_answer(client: TestClient) -> None:
    body = {"model": "sql", "prompt": "SELECT", "temperature": 0, "max_tokens": 30, "ignore_eos": True}
    text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = next(one for one in text[3:] if one != "\ufffd")
    choice = client.post("/v1/completions", json=body | {"stop": [stop]}).json()["choices"][0]
    assert choice["text"] == text.partition(stop)[0]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "lora": [{"id": "sql"}, {"id": "sql"}]}, "lora"),
        ({"prompt": "x", "model": "sql", "lora": [{"id": "french"}]}, "lora"),
        ({"prompt": "x" * 600}, "messages or prompt"),
        ({"prompt": ""}, "messages or prompt"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": "x", "tools": []}, "tools"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "temperature": "1"}, "temperature"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, None),
    ],
)
def test_what_cannot_be_done_is_said(client: TestClient, body: dict[str, Any], param: str | None) -> None:
    answer = client.post("/v1/completions", json={"model": "toy"} | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_embeddings(folder: Any) -> None:
    made = Embedder((tiny("llama"), tiny_tokenizer()), {"blue": folder / "sql"})
    with TestClient(
        create_app(engine(), name="toy", vectors=Vectors("vectors", lambda: made)), "http://localhost"
    ) as client:
        for model, adapter in (("vectors", None), ("blue", "blue"), ("vectors:blue", "blue")):
            answer = client.post("/v1/embeddings", json={"model": model, "input": ["abc", "de"]})
            vectors = CreateEmbeddingResponse.model_validate(answer.json()).data
            expected = made.embed(["abc", "de"], adapter).vectors
            assert [one.embedding for one in vectors] == [pytest.approx(row, abs=1e-6) for row in expected.tolist()]
            assert [one["id"] for one in answer.json()["gossamer"]["adapters"]] == ([adapter] if adapter else [])
        packed = {"model": "blue", "input": "abc", "encoding_format": "base64", "dimensions": 8}
        assert len(client.post("/v1/embeddings", json=packed).json()["data"][0]["embedding"]) == 44
        assert client.post("/v1/embeddings", json={"model": "toy", "input": "x"}).status_code == 404
        assert {"vectors", "blue"} <= {one["id"] for one in client.get("/v1/models").json()["data"]}
