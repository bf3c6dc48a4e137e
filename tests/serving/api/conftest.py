"""A toy with two adapters behind the API: in this process, and on a socket."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import gossamer as gs
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving.api.app import create_app
from gossamer.serving.api.keys import Keyring
from gossamer.serving.api.server import server_of
from gossamer.serving.engine import Engine

KEYS = {"admin": "admin-key-0123456789", "one": "first-tenant-key-0123", "two": "other-tenant-key-0123"}


def adapter(seed: int) -> gs.Adapter:
    """One that changes what is said."""
    model = tiny("llama")
    gs.attach(model, gs.LoRA(r=2 + seed))
    torch.manual_seed(seed)
    for parameter in gs.trainable_parameters(model, "default").values():
        parameter.data.normal_(std=0.3)
    return gs.capture(model)


@pytest.fixture(scope="session")
def learned() -> dict[str, gs.Adapter]:
    return {"sql": adapter(0), "french": adapter(1)}


@pytest.fixture
def folder(tmp_path: Path, learned: dict[str, gs.Adapter]) -> Path:
    for name, value in learned.items():
        value.save(tmp_path / "adapters" / name)
    return tmp_path / "adapters"


def engine(folder: Any = None, **options: Any) -> Engine:
    return Engine((tiny("llama"), tiny_tokenizer()), folder, **options)


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    """Without keys, as on one's own machine."""
    with TestClient(create_app(engine(folder), name="toy", folder=folder), "http://localhost") as made:
        yield made


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    entries = [
        {"key": KEYS["admin"], "tenant": "owner", "adapters": ["*"], "admin": True},
        {"key": KEYS["one"], "tenant": "one", "adapters": ["sql"]},
        {"key": KEYS["two"], "tenant": "two", "adapters": ["french"]},
    ]
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    return Keyring.read(tmp_path / "keys.json")


@pytest.fixture
def guarded(folder: Path, keyring: Keyring) -> Iterator[TestClient]:
    """With keys."""
    app = create_app(engine(folder), name="toy", folder=folder, keyring=keyring)
    with TestClient(app, "http://far.example") as made:
        yield made


def bearer(who: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[who]}"}


@pytest.fixture
def listening() -> Iterator[Callable[[Any], str]]:
    """Serve an app on a socket; gives its address."""
    running: list[tuple[Any, threading.Thread]] = []

    def start(app: Any) -> str:
        server = server_of(app, "127.0.0.1", 0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        until(lambda: server.started)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


def until(there: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
