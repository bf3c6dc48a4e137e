"""Who may do what: every route asks for a key; another tenant's adapter is as if it were not there."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute
from starlette.testclient import TestClient

from gossamer.errors import SpecError, UsageError
from gossamer.serving.api.app import create_app
from gossamer.serving.api.faults import Refusal
from gossamer.serving.api.keys import Bucket, Key, Keyring
from gossamer.serving.api.limits import OPEN
from gossamer.serving.api.server import check_host
from tests.serving.api.conftest import KEYS, bearer, engine

ASKED: dict[str, Any] = {"prompt": "abc", "temperature": 0, "max_tokens": 4}


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of all there are."""
    found: list[tuple[str, str]] = []
    for path, methods in app.openapi()["paths"].items():
        found += [(method.upper(), path.replace("{name}", "sql")) for method in methods]
    return [
        *found,
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nothing"),
        ("POST", "/v1"),
        ("PUT", "/health/"),
    ]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong-key-0123456789"},
        {"authorization": f"Basic {KEYS['one']}"},
        {"authorization": KEYS["one"]},
        {"authorization": f"Bearer {KEYS['one']}x"},
        {"authorization": f"Bearer {KEYS['one'][:-1]}"},
        {"x-api-key": KEYS["one"]},
    ],
)
def test_every_route_denies_without_a_key(guarded: TestClient, header: dict[str, str]) -> None:
    app: Any = guarded.app
    known = routes(app)
    assert len(known) >= 17
    for method, path in known:
        if path in OPEN:
            continue
        answer = guarded.request(method, path, headers=header, json={})
        assert answer.status_code == 401, f"{method} {path}"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/health").status_code == 200


def test_what_is_open_knows_nothing() -> None:
    assert {"/health", "/"} == OPEN


def test_the_walk_sees_all_routes(guarded: TestClient) -> None:
    app: Any = guarded.app

    def paths(routes: list[BaseRoute]) -> set[str]:
        nested = [getattr(one, "original_router", None) or getattr(one, "app", None) for one in routes]
        inner = [paths(one.routes) for one in nested if hasattr(one, "routes")]
        return {one.path for one in routes if hasattr(one, "path")}.union(*inner)  # type: ignore[attr-defined]

    found = {path.replace(":path", "") for path in paths(app.routes) if path}
    assert "/v1/completions" in found
    assert found - {*app.openapi()["paths"]} == {"/openapi.json"}


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_and_forbidden_look_the_same(guarded: TestClient, stream: bool) -> None:
    mine = {"model": "sql", "stream": stream} | ASKED
    assert guarded.post("/v1/completions", json=mine, headers=bearer("one")).status_code == 200
    shapes = [
        lambda name: ("/v1/completions", {"model": name, "stream": stream} | ASKED),
        lambda name: ("/v1/completions", {"model": f"toy:{name}", "stream": stream} | ASKED),
        lambda name: ("/v1/completions", {"model": "toy", "lora": [{"id": "sql"}, {"id": name}]} | ASKED),
        lambda name: ("/v1/completions", {"model": "toy", "lora": [{"id": name, "scale": 0}]} | ASKED),
        lambda name: (
            "/v1/chat/completions",
            {"model": name, "messages": [{"role": "user", "content": "x"}], "stream": stream},
        ),
        lambda name: ("/tokenize", {"model": name, "prompt": "x"}),
        lambda name: ("/detokenize", {"model": name, "tokens": [1]}),
    ]
    for shape in shapes:
        said = []
        for name in ("french", "frensh"):
            path, body = shape(name)
            answer = guarded.post(path, json=body, headers=bearer("one"))
            headers = {key: value for key, value in answer.headers.items() if key not in ("date", "content-length")}
            said.append((answer.status_code, answer.text.replace(name, "?"), headers))
        assert said[0] == said[1]
        assert said[0][0] == 404
    for name in ("french", "frensh"):
        assert guarded.get(f"/v1/models/{name}", headers=bearer("one")).status_code == 404


def test_each_sees_his_own(guarded: TestClient) -> None:
    seen = {who: {one["id"] for one in guarded.get("/v1/models", headers=bearer(who)).json()["data"]} for who in KEYS}
    assert seen == {"admin": {"toy", "sql", "french"}, "one": {"toy", "sql"}, "two": {"toy", "french"}}


def test_keys_are_compared_in_full_and_in_constant_time(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    import hmac

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: (seen.append([*map(len, pair)]), real(*pair))[1])
    for given in (KEYS["admin"], KEYS["two"], "nothing", ""):
        seen.clear()
        keyring.whose(f"Bearer {given}")
        assert seen == [[32, 32]] * 3, "every key, whichever is right"
    source = inspect.getsource(Keyring.whose)
    assert "compare_digest" in source
    assert "break" not in source


def test_without_keys_only_this_machine_may(client: TestClient) -> None:
    assert client.get("/v1/models").status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "0.0.0.0"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 403
    foreign = {"origin": "http://evil.example"}
    assert client.post("/v1/completions", json=ASKED | {"model": "toy"}, headers=foreign).status_code == 403
    own = {"origin": "http://localhost"}
    assert client.post("/v1/completions", json=ASKED | {"model": "toy"}, headers=own).status_code == 200
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        check_host(host, False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        check_host(host, True)
        with pytest.raises(UsageError, match="this machine only"):
            check_host(host, False)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {},
        ["x"],
        "no json",
        [{"tenant": "a"}],
        [{"key": "short", "tenant": "a"}],
        [{"key": "k" * 20, "key_sha256": "0" * 64, "tenant": "a"}],
        [{"key": "k" * 20, "tenant": "a", "admin": 1}],
        [{"key": "k" * 20, "tenant": "a", "requests_per_minute": 0}],
        [{"key": "k" * 20, "tenant": "a", "typo": 1}],
        [{"key": "k" * 20, "tenant": "a"}, {"key": "k" * 20, "tenant": "b"}],
        [{"key": "k" * 20, "tenant": "a"}, {"key": "j" * 20, "tenant": "a", "concurrent": 1}],
    ],
)
def test_a_bad_key_file_is_refused_without_quoting_keys(tmp_path: Path, entries: Any) -> None:
    (tmp_path / "keys.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
    with pytest.raises(SpecError) as caught:
        Keyring.read(tmp_path / "keys.json")
    assert "k" * 20 not in str(caught.value)
    assert "short" not in str(caught.value)


def test_a_hash_serves_as_well_as_the_key() -> None:
    ring = Keyring([Key(key_sha256=hashlib.sha256(b"secret-key-0123456").hexdigest(), tenant="a")])
    tenant = ring.whose("Bearer secret-key-0123456")
    assert tenant is not None
    assert tenant.name == "a"
    assert not tenant.may("sql"), "no adapters unless they are named"


# Quotas --------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_fills_again() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait(1) == pytest.approx(1)
    clock.now = 10
    assert bucket.wait(10) == 0
    assert bucket.wait(20) == pytest.approx(10)
    clock.now = 10_000
    assert bucket.wait(60) == 0, "no more than a minute's worth is kept"
    assert bucket.wait(61) == float("inf")


def test_limits_are_the_tenants_whatever_key_he_uses() -> None:
    ring = Keyring([Key(key=letter * 20, tenant="a", concurrent=2) for letter in "kj"])
    first, second = ring.whose("Bearer " + "k" * 20), ring.whose("Bearer " + "j" * 20)
    assert first
    assert second
    visits = [first.allowance.enter(1), second.allowance.enter(1)]
    with pytest.raises(Refusal) as caught:
        first.allowance.enter(1)
    assert caught.value.status == 429
    visits[0].leave()
    visits[0].leave()
    second.allowance.enter(1)
    with pytest.raises(Refusal):
        first.allowance.enter(1)


def test_quotas_over_http(folder: Path) -> None:
    clock = Clock()
    keys = [
        Key(key="r" * 20, tenant="requests", requests_per_minute=2),
        Key(key="t" * 20, tenant="tokens", tokens_per_minute=20),
    ]
    app = create_app(engine(folder), name="toy", keyring=Keyring(keys, clock))
    with TestClient(app, "http://far.example") as client:

        def ask(letter: str, **more: Any) -> Any:
            body = {"model": "toy", "prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True} | more
            return client.post("/v1/completions", json=body, headers={"authorization": "Bearer " + letter * 20})

        assert [ask("r").status_code for _ in range(3)] == [200, 200, 429]
        refused = ask("r")
        assert refused.headers["retry-after"] == "30"
        assert refused.json()["error"]["code"] == "requests_exceeded"
        clock.now = 30
        assert [ask("r").status_code for _ in range(2)] == [200, 429]
        assert [ask("t").status_code for _ in range(3)] == [200, 200, 429], "7 tokens each"
        assert ask("t", n=8).status_code == 400, "more than a minute ever gives"
        clock.now = 100
        stopped = ask("t", max_tokens=15, stop="\ufffd", ignore_eos=True)
        assert stopped.status_code == 200
