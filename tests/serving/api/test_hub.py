"""Adapters that are asked for by their id on a hub: allowed ones only, at one commit, and safetensors and JSON only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from starlette.testclient import TestClient

import gossamer as gs
from gossamer.cli import main
from gossamer.errors import DownloadError, UsageError
from gossamer.serving.api import backends
from gossamer.serving.api.app import create_app
from gossamer.serving.api.keys import Keyring
from gossamer.serving.hub import Hub
from tests.serving.api.conftest import adapter, bearer, engine, until

ASKED: dict[str, Any] = {"prompt": "abc", "temperature": 0, "max_tokens": 3}


class Fake:
    """A hub of folders; notes what was asked of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits: dict[str, str] = {}
        self.asked: list[str] = []
        self.taken: list[tuple[str, str, tuple[str, ...]]] = []
        self.down = False
        self.open = threading.Event()
        self.open.set()

    def publish(self, name: str, commit: str, value: gs.Adapter | None = None) -> Path:
        """Let an id mean a new commit."""
        folder = self.root / f"{name.replace('/', '--')}-{commit}"
        folder.mkdir(parents=True)
        if value:
            value.save(folder / "x")
            for file in (folder / "x").iterdir():
                file.rename(folder / file.name)
            (folder / "x").rmdir()
        (folder / "training_args.bin").write_bytes(b"a pickle")
        self.commits[name] = commit
        return folder

    def model_info(self, name: str, *, revision: str | None, files_metadata: bool, timeout: float) -> Any:
        assert revision is None
        assert files_metadata
        assert timeout <= 10
        self.asked.append(name)
        assert self.open.wait(20)
        if self.down:
            raise httpx_of_the_hub("no route to https://hub.example/?token=secret")
        if name not in self.commits:
            answer = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
            raise RepositoryNotFoundError("404", response=answer)  # type: ignore[arg-type]
        folder = self.root / f"{name.replace('/', '--')}-{self.commits[name]}"
        paths = [one for one in folder.rglob("*") if one.is_file()]
        files = [SimpleNamespace(rfilename=str(one.relative_to(folder)), size=one.stat().st_size) for one in paths]
        return SimpleNamespace(sha=self.commits[name], siblings=files)

    def snapshot_download(self, name: str, *, revision: str, allow_patterns: list[str], **_: Any) -> str:
        self.taken.append((name, revision, tuple(allow_patterns)))
        return str(self.root / f"{name.replace('/', '--')}-{revision}")


def httpx_of_the_hub(text: str) -> Exception:
    """The error of the network that the hub's client lets through."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError(text)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


@pytest.fixture
def client(folder: Path, fake: Fake) -> Iterator[TestClient]:
    app = create_app(engine(folder), name="toy", folder=folder, hub=Hub(["org/*", "one/exactly"], most=10**6))
    with TestClient(app, "http://localhost") as made:
        yield made


def ask(client: TestClient, model: str, **more: Any) -> Any:
    return client.post("/v1/completions", json=ASKED | {"model": model} | more)


def test_an_id_is_fetched_once_and_stays_at_its_commit(client: TestClient, fake: Fake) -> None:
    first, second = adapter(3), adapter(4)
    fake.publish("org/sql", "c1", first)
    for _ in range(2):
        answer = ask(client, "org/sql")
        assert answer.json()["gossamer"]["adapters"] == [{"id": "org/sql", "scale": 1.0, "digest": first.digest}]
    assert answer.headers["x-gossamer-adapter"] == f"org%2Fsql=sha256:{first.digest}"
    assert fake.taken == [("org/sql", "c1", ("adapter_config.json", "adapter_model.safetensors", "gossamer.json"))]
    [listed] = [one for one in client.get("/v1/models").json()["data"] if one["id"] == "org/sql"]
    assert listed["gossamer"]["revision"] == "c1"
    assert listed["root"] == first.digest
    assert client.get("/v1/models/org/sql").json() == listed

    fake.publish("org/sql", "c2", second)  # which changes nothing here
    assert ask(client, "org/sql").json()["gossamer"]["adapters"][0]["digest"] == first.digest
    assert fake.asked == ["org/sql"]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "org/sql"}).status_code == 200
    assert ask(client, "org/sql").json()["gossamer"]["adapters"][0]["digest"] == second.digest
    assert client.get("/v1/models/org/sql").json()["gossamer"]["revision"] == "c2"


def test_it_comes_with_its_own_chat_template(client: TestClient, fake: Fake) -> None:
    folder = fake.publish("org/spoken", "c1", adapter(3))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content * 3 }}")
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool_use.jinja", "x.py"):
        (folder / "additional_chat_templates" / name).write_text("x")
    asked = {"model": "org/spoken", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"] == 6
    [(_, _, taken)] = fake.taken
    assert {*taken[3:]} == {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}


def test_in_a_mix_and_a_chat(client: TestClient, fake: Fake) -> None:
    fake.publish("org/a", "c1", adapter(3))
    fake.publish("org/b", "c1", adapter(4))
    mix = [{"id": "org/a", "scale": 0.5}, {"id": "sql", "scale": 0.5}]
    assert [one["id"] for one in ask(client, "toy", lora=mix).json()["gossamer"]["adapters"]] == ["org/a", "sql"]
    turns = {"model": "toy:org/b", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=turns).status_code == 200
    mix = [{"id": "org/c"}, {"id": "other/one"}]
    fake.publish("org/c", "c1", adapter(5))
    assert ask(client, "toy", lora=mix).status_code == 404
    assert "org/c" not in fake.asked, "nothing is fetched for a mix that is refused anyway"


@pytest.mark.parametrize(
    "name",
    ["other/one", "one/exactly-not", "org", "org/", "org/a/b", "/org/a", "org/../x", "xorg/a", "org/é", "org/a\n"],
)
def test_what_is_not_allowed_is_as_if_it_were_nowhere(client: TestClient, fake: Fake, name: str) -> None:
    fake.commits[name] = "c1"
    refused, unknown = ask(client, name), ask(client, "no-such-name")
    assert refused.status_code == unknown.status_code == 404
    assert refused.json()["error"] | {"message": ""} == unknown.json()["error"] | {"message": ""}
    assert refused.json()["error"]["message"] == f"The model {name!r} does not exist."
    assert not fake.asked


def test_what_the_hub_has_not_is_unknown_and_not_asked_again(client: TestClient, fake: Fake) -> None:
    for _ in range(3):
        answer = ask(client, "org/nothing")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    assert fake.asked == ["org/nothing"]


def test_what_cannot_be_used(client: TestClient, fake: Fake) -> None:
    fake.publish("org/none", "c1")
    fake.publish("org/large", "c1", adapter(3)).joinpath("adapter_model.safetensors").write_bytes(b"0" * (10**6 + 1))
    broken = fake.publish("org/broken", "c1", adapter(3)) / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-50])
    for name, word in (("org/none", "no adapter"), ("org/large", "too large"), ("org/broken", "safetensors")):
        answer = ask(client, name)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "adapter-file"
        assert word in answer.json()["error"]["message"]
        assert str(fake.root) not in answer.text
        assert ask(client, "sql").status_code == 200
    assert [name for name, _, _ in fake.taken] == ["org/broken"], "the others were refused by what the hub told of them"
    assert all("/" not in one["id"] for one in client.get("/v1/models").json()["data"])


def test_a_hub_that_does_not_answer(client: TestClient, fake: Fake) -> None:
    fake.down = True
    answer = ask(client, "org/a")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert "secret" not in answer.text
    assert ask(client, "sql").status_code == 200


def test_keys_hold_for_ids(folder: Path, fake: Fake) -> None:
    entries = [
        {"key": "first-tenant-key-0123", "tenant": "one", "adapters": ["org/a"]},
        {"key": "other-tenant-key-0123", "tenant": "two", "adapters": ["sql"]},
    ]
    ring = Keyring([_key(**one) for one in entries])
    fake.publish("org/a", "c1", adapter(3))
    app = create_app(engine(folder), name="toy", keyring=ring, hub=Hub(["org/*"]))
    with TestClient(app, "http://far.example") as client:

        def status(who: str, model: str) -> int:
            return client.post("/v1/completions", json=ASKED | {"model": model}, headers=bearer(who)).status_code

        assert status("two", "org/a") == 404
        assert status("one", "org/b") == 404
        assert not fake.asked
        assert status("one", "org/a") == 200
        assert status("two", "org/a") == 404
        for who, names in (("one", {"toy", "org/a"}), ("two", {"toy", "sql"})):
            assert {one["id"] for one in client.get("/v1/models", headers=bearer(who)).json()["data"]} == names


def _key(**fields: Any) -> Any:
    from gossamer.serving.api.keys import Key

    return Key.from_dict(fields)


def test_many_who_ask_at_once_fetch_once_and_nobody_else_waits(
    folder: Path, fake: Fake, listening: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "FETCHES", 2)
    fake.publish("org/a", "c1", adapter(3))
    fake.publish("org/b", "c1", adapter(4))
    address = listening(create_app(engine(folder), name="toy", hub=Hub(["org/*"])))
    statuses: list[int] = []

    def one(name: str) -> None:
        body = ASKED | {"model": name}
        statuses.append(httpx.post(f"{address}/v1/completions", json=body, timeout=30).status_code)

    fake.open.clear()
    threads = [threading.Thread(target=one, args=(name,)) for name in ["org/a"] * 4 + ["org/b"]]
    for thread in threads:
        thread.start()
    until(lambda: len(fake.asked) == 2)
    with pytest.raises(httpx.TimeoutException):  # leaves; the fetching goes on
        httpx.post(f"{address}/v1/completions", json=ASKED | {"model": "org/a"}, timeout=0.2)
    assert httpx.post(f"{address}/v1/completions", json=ASKED | {"model": "sql"}, timeout=30).status_code == 200
    full = httpx.post(f"{address}/v1/completions", json=ASKED | {"model": "org/c"}, timeout=30)
    assert full.status_code == 429
    assert full.headers["retry-after"]
    fake.open.set()
    for thread in threads:
        thread.join(30)
    assert statuses == [200] * 5
    assert sorted(fake.asked) == ["org/a", "org/b"]


def test_patterns() -> None:
    assert not Hub().allows("org/a")
    assert Hub(["org/sql-*"]).allows("org/sql-1.b")
    assert not Hub(["org/sql-*"]).allows("org/other")
    assert not Hub(["o.g/*"]).allows("org/a"), "a dot is a dot"
    assert Hub(["*/*"]).allows("any/thing")
    for pattern in ("*", "", "org", "org/a/b", "org/[a]", "../*/"):
        with pytest.raises(UsageError):
            Hub([pattern])
    with pytest.raises(UsageError):
        Hub(["org/*"]).fetch("other/one")
    with pytest.raises(DownloadError):  # the real client, which the tests allow no network
        Hub(["org/*"]).fetch("org/a")
    assert main(["serve", "--base", "x", "--hub", "everything"]) == 2
    assert main(["serve", "--base", "x", "--hub", "org/*", "--engine", "vllm"]) == 2
