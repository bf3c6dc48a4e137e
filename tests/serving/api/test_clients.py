"""OpenAI's own client, `llm` and curl against a server on a socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import gossamer as gs
from gossamer.serving.api.app import create_app
from gossamer.serving.api.limits import HttpLimits
from tests.serving.api.conftest import engine, until

TURNS: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def address(folder: Path, listening: Callable[[Any], str]) -> str:
    return listening(create_app(engine(folder), name="toy", folder=folder))


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_openai(client: openai.OpenAI, learned: dict[str, gs.Adapter]) -> None:
    assert [one.id for one in client.models.list()] == ["toy", "french", "sql"]
    assert client.models.retrieve("sql").id == "sql"
    asked: Any = {"model": "sql", "messages": TURNS, "temperature": 0, "max_completion_tokens": 8, "seed": 1}
    whole = client.chat.completions.with_raw_response.create(**asked)
    digest = learned["sql"].digest
    assert whole.headers["x-gossamer-adapter"] == f"sql=sha256:{digest}"
    answer = whole.parse()
    assert answer.model_extra == {"gossamer": {"adapters": [{"id": "sql", "scale": 1.0, "digest": digest}]}}
    text = answer.choices[0].message.content
    pieces = [*client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == text
    assert pieces[-1].usage
    assert answer.usage
    assert pieces[-1].usage.total_tokens == answer.usage.total_tokens
    plain = client.completions.create(model="toy:sql", prompt="abc", max_tokens=4, logprobs=1, n=2)
    assert len(plain.choices) == 2
    mix = client.completions.create(
        model="toy", prompt="abc", extra_body={"lora": [{"id": "sql", "scale": 0.5}, {"id": "french", "scale": 0.5}]}
    )
    assert [one["id"] for one in (mix.model_extra or {})["gossamer"]["adapters"]] == ["sql", "french"]
    for kind, call in (
        (openai.NotFoundError, lambda: client.completions.create(model="nothing", prompt="x")),
        (openai.BadRequestError, lambda: client.completions.create(model="sql", prompt="x", n=1000)),
        (openai.BadRequestError, lambda: client.embeddings.create(model="toy", input="x")),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.type in ("not_found_error", "invalid_request_error")


def test_json_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="sql",
        messages=TURNS,
        max_tokens=200,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content or "")["a"] in (True, False)
    assert answer.choices[0].finish_reason == "stop"


def test_curl(address: str) -> None:
    body = json.dumps({"model": "sql", "prompt": "abc", "max_tokens": 3, "stream": True, "temperature": 0})
    command = ["curl", "-sN", f"{address}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert out.startswith("data: {")
    assert out.endswith("data: [DONE]\n\n")


def test_llm(address: str, client: openai.OpenAI, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: sql\n  model_name: sql\n  api_base: {address}/v1\n  api_key_name: toy\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none", "PYTHONPATH": ""}
    answer = client.chat.completions.create(model="sql", messages=TURNS, temperature=0, max_tokens=8)
    options = ["-o", "max_tokens", "8", "-o", "temperature", "0", "--key", "none", "--no-stream"]
    command = [sys.executable, "-m", "llm", "-m", "sql", "Hello", *options]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == (answer.choices[0].message.content or "") + "\n"


def test_a_client_who_leaves_frees_his_rows(folder: Path, listening: Callable[[Any], str]) -> None:
    app = create_app(engine(folder), name="toy", folder=folder)
    address = listening(app)
    service, body = app.state.service, {"model": "sql", "prompt": "abc", "n": 2, "ignore_eos": True}
    made = service.worker.engine
    for round in range(10):
        with httpx.stream("POST", f"{address}/v1/completions", json=body | {"stream": True, "max_tokens": 400}) as one:
            next(one.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=body | {"max_tokens": 505}, timeout=0.02 + round / 100)
    until(lambda: not made.busy and not service.answering and not service.worker.watched)
    assert made.store.describe("sql")["state"] == "memory", "nobody holds it"
    assert service.metrics.cancelled._value.get() >= 10
    assert httpx.post(f"{address}/v1/completions", json=body | {"max_tokens": 2}).status_code == 200


def test_an_answer_that_takes_too_long_is_ended(folder: Path, listening: Callable[[Any], str]) -> None:
    app = create_app(engine(folder), name="toy", bounds=HttpLimits(answering=0.05))
    address = listening(app)
    body = {"model": "sql", "prompt": "abc", "n": 16, "ignore_eos": True, "max_tokens": 500}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 504
    until(lambda: not app.state.service.worker.engine.busy)


def test_a_full_queue_says_when_to_come_back(folder: Path, listening: Callable[[Any], str]) -> None:
    from gossamer.serving.scheduler import Limits

    app = create_app(engine(folder, limits=Limits(rows=1, waiting=2)), name="toy")
    address = listening(app)
    body = {"model": "sql", "prompt": "abc", "n": 3, "max_tokens": 2}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    until(lambda: not app.state.service.worker.engine.busy)
    assert httpx.post(f"{address}/v1/completions", json=body | {"n": 1}, timeout=30).status_code == 200


def test_slow_clients_are_not_waited_for(folder: Path, listening: Callable[[Any], str]) -> None:
    import socket

    address = listening(create_app(engine(folder), name="toy", bounds=HttpLimits(reading=0.3)))
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        began = time.monotonic()
        assert b"408" in slow.recv(1000)
        assert time.monotonic() - began < 5
    with socket.create_connection(("127.0.0.1", port)) as large:
        large.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"x-a: " + b"y" * 100_000)
        assert b"400" in large.recv(1000)
