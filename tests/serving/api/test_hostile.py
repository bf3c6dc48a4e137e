"""Requests that mean harm: refused at once, told nothing, and nobody else notices."""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from gossamer.serving.api.app import create_app
from gossamer.serving.api.limits import HttpLimits, deeper
from tests.serving.api.conftest import engine

PROMPT = "the-secret-prompt"
GOOD: dict[str, Any] = {"model": "sql", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}

FIELDS: list[tuple[str, Any]] = [
    *[("n", value) for value in (10**6, 0, -1, 1.5, "2", True, 2**63, [])],
    *[("max_tokens", value) for value in (-1, 0, 2**63, 10**30, "many", 1e400, True)],
    *[("temperature", value) for value in (-1, 3, float("nan"), float("inf"), "hot", [], True)],
    *[("top_p", value) for value in (0, -0.1, 1.1, float("nan"))],
    *[("top_k", value) for value in (-2, 2**64, 0.5)],
    *[("min_p", value) for value in (-1, 2)],
    *[("presence_penalty", value) for value in (-2.1, 2.1)],
    *[("frequency_penalty", value) for value in (-2.1, float("-inf"))],
    *[("repetition_penalty", value) for value in (0, -1, 1000, 1e-40)],
    *[("seed", value) for value in (-2, 2**63, 0.5, "x")],
    *[("stop", value) for value in (["x"] * 100_000, "", [""], ["x" * 257], 7, [[]], {"a": 1})],
    *[("logit_bias", value) for value in ({"x": 1}, {"-1": 1}, {"1": 101}, {"1": None}, {"9" * 400: 1}, [1, 2])],
    ("logit_bias", {str(one): 0 for one in range(1025)}),
    *[("logprobs", value) for value in (21, -1, 10**9, "5")],
    *[
        ("prompt", value)
        for value in (None, {}, [], [[]], [["x"]], [-1], [1.5], [2**31], [2**70], ["x"] * 65, "\ud800")
    ],
    *[("lora", value) for value in ([{"id": "sql"}] * 9, [{"id": ""}], [{"id": "x" * 300}], [{"scale": 1}], "sql")],
    *[("lora", [{"id": "sql", "scale": value}]) for value in (101, -101, float("nan"), "1", None)],
    *[("model", value) for value in ("", None, 3, "x" * 10_000, ["sql"])],
    *[("stream", value) for value in ("yes", 1, [])],
    *[("stream_options", value) for value in ({"include_usage": 3}, {"x": 1}, [])],
    *[
        ("response_format", value)
        for value in ({"type": "xml"}, {"type": "json_schema"}, {"type": "text", "json_schema": {}})
    ],
    *[("user", value) for value in ("u" * 257, 5)],
    *[(name, True) for name in ("echo", "chat_template", "prompt_embeds", "guided_grammar", "\ud800", "__class__")],
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, learned: Any) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, value in learned.items():
        value.save(folder / name)
    app = create_app(engine(folder), name="toy", folder=folder, bounds=HttpLimits(body=2**20))
    with TestClient(app, "http://localhost") as client:
        yield client


def post(client: TestClient, body: Any, path: str = "/v1/completions", **headers: str) -> Any:
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    return client.post(path, content=text, headers={"content-type": "application/json"} | headers)


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_fields_out_of_bounds(shared: TestClient, field: str, value: Any) -> None:
    began = time.monotonic()
    answer = post(shared, GOOD | {field: value})
    assert 400 <= answer.status_code < 500, answer.text
    assert time.monotonic() - began < 1
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len(answer.text) < 2000, "what was sent is not sent back"
    assert PROMPT not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        "{" * 100_000,
        '{"a":' * 100_000,
        "[" * 200,
        '{"model":"sql","prompt":"x","seed":' + "9" * 10_000 + "}",
        '{"model":"sql","prompt":"x","temperature":NaN}',
        b"\xff\xfe\x00\x01",
        "x" * 900_000,
        '{"model":"sql","prompt":' + '["x",' * 63 + '"x"' + "]" * 63 + "}",
    ],
)
def test_bodies_that_are_none(shared: TestClient, body: Any) -> None:
    began = time.monotonic()
    answer = post(shared, body)
    assert answer.status_code in (400, 422)
    assert time.monotonic() - began < 1
    assert "error" in answer.json()
    assert post(shared, GOOD).status_code == 200


def test_bodies_that_are_too_large(shared: TestClient) -> None:
    assert post(shared, b"x" * (2**20 + 1)).status_code == 413
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 2**20
            yield b" " * 2**20

    assert shared.post("/v1/completions", content=pieces()).status_code == 413
    for length in (str(10**9), "9" * 100, "-1", "x"):
        assert post(shared, "{}", **{"content-length": length}).status_code == 413


def test_bodies_of_all_together(folder: Path, listening: Callable[[Any], str]) -> None:
    """Sixty-four clients hold 2 MiB each and do not finish: the server keeps 16 MiB of them and turns the rest away."""
    bounds = HttpLimits(body=4 * 2**20, bodies=16 * 2**20, reading=3)
    address = listening(create_app(engine(folder), name="toy", folder=folder, bounds=bounds))
    port, body = int(address.rpartition(":")[2]), b" " * 2**21
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body) + 1}\r\n\r\n".encode()

    async def hold() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head + body)
            return (await reader.readline())[9:12]
        except ConnectionError:  # turned away while he still sends
            return b"429"
        finally:
            writer.close()

    async def together() -> tuple[list[bytes], int]:
        holding = [asyncio.ensure_future(hold()) for _ in range(64)]
        while sum(one.done() for one in holding) < 40:
            await asyncio.sleep(0.01)
        most = resident()
        return await asyncio.gather(*holding), most

    before = resident()
    statuses, most = asyncio.run(together())
    heard = collections.Counter(statuses)
    assert most - before < 80 * 2**20
    assert set(heard) == {b"408", b"429"}
    assert 0 < heard[b"408"] <= 8
    assert httpx.post(f"{address}/v1/completions", json=GOOD, timeout=30).status_code == 200, "all of it was let go"


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) * 1024


def test_other_ways(shared: TestClient) -> None:
    assert post(shared, GOOD, **{"content-encoding": "gzip"}).status_code == 415
    assert post(shared, GOOD, **{"content-type": "text/plain"}).status_code in (400, 415, 422)
    headers = {f"x-{number}": "y" for number in range(100)}
    assert post(shared, GOOD, **headers).status_code == 431
    assert shared.get("/v1/completions").status_code == 405
    assert shared.request("TRACE", "/health").status_code == 405
    assert shared.get("/v1/%2e%2e/health").status_code == 404


def test_depth_is_of_brackets_not_of_text() -> None:
    assert not deeper(json.dumps({"x": "[" * 1000 + '"\\'}).encode(), 4)
    assert deeper(b'[[[["]]]]"]]]]', 3)
    assert not deeper(b"[[[]]]" * 1000, 3)


@pytest.mark.parametrize(
    "edge",
    [
        {"temperature": 5e-324},
        {"temperature": 1, "top_p": 5e-324},
        {"temperature": 1, "top_p": 1e-30, "top_k": 1, "min_p": 1},
        {"temperature": 2, "repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": -2},
    ],
)
def test_the_smallest_numbers(shared: TestClient, edge: dict[str, Any]) -> None:
    """What float32 takes for 0 must not stop the engine for everybody."""
    assert post(shared, GOOD | {"max_tokens": 6, "ignore_eos": True} | edge).status_code == 200
    assert shared.get("/ready").status_code == 200


@pytest.mark.parametrize("role", ["tool", "function", "", "x" * 1000, None])
def test_chat_fields(shared: TestClient, role: Any) -> None:
    chat = {"model": "sql", "messages": [{"role": role, "content": PROMPT}]}
    assert post(shared, chat, "/v1/chat/completions").status_code == 400
    for content in (None, 5, [], [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "\udfff"):
        chat = {"model": "sql", "messages": [{"role": "user", "content": content}]}
        assert post(shared, chat, "/v1/chat/completions").status_code == 400
    for more in (
        {"top_logprobs": 3},
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"tools": [{}]},
        {"functions": [{}]},
    ):
        chat = {"model": "sql", "messages": [{"role": "user", "content": "x"}]} | more
        assert post(shared, chat, "/v1/chat/completions").status_code == 400
    assert post(shared, {"model": "sql", "messages": []}, "/v1/chat/completions").status_code == 400


def test_tokens_out_of_range(shared: TestClient) -> None:
    for tokens in ([10**6], [-1], [2**40], ["x"], None):
        assert post(shared, {"tokens": tokens}, "/detokenize").status_code == 400
    assert post(shared, {"prompt": "x", "messages": []}, "/tokenize").status_code == 400
    assert post(shared, {}, "/tokenize").status_code == 400


def test_faults_of_ours_tell_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the answer nor the log has the prompt, a path or an address; the number joins them."""
    made = engine(folder)

    def broken() -> int:
        raise RuntimeError(f"at {object()!r} in {folder} with {PROMPT}")

    with TestClient(create_app(made, name="toy", folder=folder), "http://localhost") as client:
        assert post(client, GOOD).status_code == 200
        with caplog.at_level(logging.DEBUG, "gossamer"):
            monkeypatch.setattr(made, "step", broken)
            answer = post(client, GOOD)
            later = post(client, GOOD)
        assert answer.status_code == 500
        assert later.status_code == 503
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        number = re.search(r"noted as ([0-9a-f]{16})", answer.text)
        assert number
        assert number[1] in caplog.text
        assert "RuntimeError" in caplog.text
        for text in (answer.text, later.text, caplog.text):
            assert PROMPT not in text
            assert str(folder) not in text
            assert not re.search(r"0x[0-9a-f]{6}", text)


def test_a_fault_in_a_route_tells_nothing(shared: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = shared.app

    def broken(*_: Any) -> Any:
        raise ValueError(PROMPT)

    monkeypatch.setattr(app.state.service.completions, "resolve", broken)
    answer = post(shared, GOOD)
    assert answer.status_code == 500
    assert PROMPT not in answer.text


def test_headers_of_every_answer(shared: TestClient) -> None:
    for answer in (shared.get("/health"), post(shared, GOOD), post(shared, "{"), post(shared, b"x" * (2**20 + 1))):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
