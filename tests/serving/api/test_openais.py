"""What stock clients send: every field of OpenAI's has its place, nulls and defaults ask nothing, the rest is named."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from openai.types import chat as chats
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from starlette.testclient import TestClient

from gossamer.serving.api import requests
from gossamer.serving.api.requests import (
    UNSUPPORTED,
    RequestBody,
    UnsupportedOfChats,
    UnsupportedOfCompletions,
    UnsupportedOfMessages,
)

CHAT: dict[str, Any] = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
PLAIN: dict[str, Any] = {"model": "toy", "prompt": "hi", "max_tokens": 1}
PARAMETERS: dict[type[RequestBody], list[Any]] = {
    requests.ChatRequest: [chat_create_params.CompletionCreateParamsNonStreaming],
    requests.CompletionRequest: [completion_create_params.CompletionCreateParamsNonStreaming],
    requests.EmbeddingRequest: [embedding_create_params.EmbeddingCreateParams],
    requests.StreamOptions: [chats.ChatCompletionStreamOptionsParam],
    requests.ChatMessage: [
        chats.ChatCompletionAssistantMessageParam,
        chats.ChatCompletionDeveloperMessageParam,
        chats.ChatCompletionSystemMessageParam,
        chats.ChatCompletionUserMessageParam,
        chats.ChatCompletionToolMessageParam,
        chats.ChatCompletionFunctionMessageParam,
    ],
}
IDLE: dict[str, list[Any]] = {
    "audio": [None],
    "function_call": [None, "none", "auto"],
    "functions": [None, []],
    "metadata": [None, {}],
    "modalities": [None, ["text"]],
    "moderation": [None],
    "parallel_tool_calls": [None, True, False],
    "prediction": [None],
    "prompt_cache_key": [None, "a"],
    "prompt_cache_options": [None],
    "prompt_cache_retention": [None],
    "reasoning_effort": [None, "none"],
    "safety_identifier": [None, "a"],
    "service_tier": [None, "auto", "default"],
    "store": [None, False],
    "tool_choice": [None, "none", "auto"],
    "tools": [None, []],
    "verbosity": [None, "medium"],
    "web_search_options": [None],
    "best_of": [None, 1, 1.0],
    "echo": [None, False],
    "suffix": [None],
}
"""What asks for nothing."""
ASKING: dict[str, list[Any]] = {
    "audio": [{"voice": "alloy", "format": "wav"}],
    "function_call": [{"name": "f"}],
    "functions": [[{"name": "f"}]],
    "metadata": [{"a": "b"}],
    "modalities": [["text", "audio"], ["audio"]],
    "moderation": [{"model": "m"}],
    "prediction": [{"type": "content", "content": "x"}],
    "prompt_cache_options": [{}],
    "prompt_cache_retention": ["24h", "in_memory"],
    "reasoning_effort": ["low", "high"],
    "service_tier": ["priority"],
    "store": [True],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "verbosity": ["low"],
    "web_search_options": [{}],
    "best_of": [2],
    "echo": [True],
    "suffix": ["x"],
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_every_field_of_openais_has_its_place(model: type[RequestBody]) -> None:
    theirs = {name for one in PARAMETERS[model] for name in typing.get_type_hints(one)}
    assert theirs - {*model.model_fields} == set(), "put it among what is honoured, or among the unsupported"


def test_what_is_idle_is_all_there() -> None:
    idle = {*UnsupportedOfChats.model_fields} | {*UnsupportedOfCompletions.model_fields}
    assert idle == {*IDLE}
    assert {*ASKING} | {"parallel_tool_calls", "prompt_cache_key", "safety_identifier"} == idle
    assert {*ASKING} <= {*UNSUPPORTED}


@pytest.mark.parametrize("name", IDLE)
def test_idle_fields(client: TestClient, name: str) -> None:
    path, body = (
        ("/v1/completions", PLAIN) if name in UnsupportedOfCompletions.model_fields else ("/v1/chat/completions", CHAT)
    )
    for value in IDLE[name]:
        assert client.post(path, json=body | {name: value}).status_code == 200, value
    for value in ASKING.get(name, ()):
        answer = client.post(path, json=body | {name: value})
        error = answer.json()["error"]
        assert answer.status_code == 400, value
        assert error["param"].partition(".")[0] == name
        assert UNSUPPORTED[name] in error["message"]


MODELS = [
    one
    for one in vars(requests).values()
    if isinstance(one, type) and issubclass(one, RequestBody) and one.__module__ == requests.__name__
]


@pytest.mark.parametrize("model", MODELS)
def test_what_need_not_be_given_may_be_null(model: type[RequestBody]) -> None:
    document = model.model_json_schema()
    needed = document.get("required", [])
    for name, about in document.get("properties", {}).items():
        takes_null = any(one.get("type") == "null" for one in (about, *about.get("anyOf", ())))
        assert takes_null or name in needed or (model, name) == (requests.WeightedAdapter, "scale"), name


def test_an_answer_comes_back_as_a_turn(client: TestClient) -> None:
    import openai.types.chat as types

    answer = client.post("/v1/chat/completions", json=CHAT).json()
    said = types.ChatCompletion.model_validate(answer).choices[0].message.model_dump()
    turns = [*CHAT["messages"], said, {"role": "user", "content": "more"}]
    again = client.post("/v1/chat/completions", json=CHAT | {"messages": turns})
    assert again.status_code == 200, again.text
    assert {*UnsupportedOfMessages.model_fields} <= {*said} | {"tool_call_id"}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for turn in ({**said, "tool_calls": [call]}, {**said, "content": None}, {"role": "tool", "content": "4"}):
        refused = client.post("/v1/chat/completions", json=CHAT | {"messages": [*CHAT["messages"], turn]})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].startswith("messages.1.")


@pytest.mark.parametrize("field", ["max_tokens", "seed", "n", "top_k", "logprobs"])
def test_whole_numbers_may_have_a_point(client: TestClient, field: str) -> None:
    answers = [client.post("/v1/completions", json=PLAIN | {"seed": 1, field: one}) for one in (2, 2.0)]
    assert [one.status_code for one in answers] == [200, 200]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    for wrong in (2.5, "2", True):
        assert client.post("/v1/completions", json=PLAIN | {field: wrong}).status_code == 400


def test_token_ids_may_have_a_point(client: TestClient) -> None:
    for path, body in (("/v1/completions", PLAIN | {"prompt": [72.0, 73]}), ("/detokenize", {"tokens": [72.0, 73]})):
        assert client.post(path, json=body).status_code == 200
    assert client.post("/v1/completions", json=PLAIN | {"prompt": [72.5]}).status_code == 400


def test_minus_one_is_none(client: TestClient) -> None:
    whole = PLAIN | {"max_tokens": 8, "temperature": 2, "ignore_eos": True}
    texts = [
        client.post("/v1/completions", json=whole | {"seed": seed, "top_k": -1}).json()["choices"][0]["text"]
        for seed in (-1, -1, 4, 4)
    ]
    assert texts[0] != texts[1]
    assert texts[2] == texts[3]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "video_url", "video_url": {"url": "x"}},
        {"type": "hologram"},
    ],
)
def test_parts_that_are_no_text_are_named(client: TestClient, part: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "what is it"}, part]}]
    error = client.post("/v1/chat/completions", json=CHAT | {"messages": turns}).json()["error"]
    assert error["param"].startswith("messages.0.content")
    assert ".1" in error["param"].removeprefix("messages.0.content")
    assert "'text'" in error["message"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_the_content_type_is_named(client: TestClient, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = client.post("/v1/completions", content=b'{"model": "toy", "prompt": "a"}', headers=headers)
    assert answer.status_code == 415
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_paths_with_slashes_and_heads(client: TestClient) -> None:
    for path in ("/v1/completions/", "/v1//completions", "http://localhost//v1/completions"):
        assert client.post(path, json=PLAIN).status_code == 200
    for path in ("/health", "/ready", "/", "/v1/models", "/v1/models/", "/version", "/v1/models/toy"):
        whole, head = client.get(path), client.head(path)
        assert (whole.status_code, head.status_code) == (200, 200)
        assert head.content == b""
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert client.head("/v1/completions").status_code == 405
    assert client.head("/nothing").status_code == 404


def test_requests_have_numbers(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gossamer.serving")
    for given, told in (("abc-123", True), ("a b", False), ("x" * 200, False), ("é".encode(), False)):
        for path, body in (("/v1/completions", PLAIN), ("/v1/completions", {}), ("/nothing", {})):
            answer = client.post(path, json=body, headers={"x-request-id": given})
            assert answer.headers.get("x-request-id") == (given if told else None)
            assert f"request {given if told else '-'}: POST " in caplog.text
    assert "hi" not in caplog.text.split()


def test_the_page_says_that_an_answer_was_cut(client: TestClient) -> None:
    text = client.get("/").text
    assert 'choice.finish_reason === "length"' in text
    assert "the limit of tokens was reached" in text
