"""Loading, replacing and unloading adapters while serving; nothing outside the server's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from openai.types import Model
from starlette.testclient import TestClient

import gossamer as gs
from gossamer.serving.api.app import create_app
from tests.serving.api.conftest import adapter, bearer, engine

ASKED: dict[str, Any] = {"prompt": "abc", "temperature": 0, "max_tokens": 4}


def load(client: TestClient, name: str, path: str, **more: Any) -> Any:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path} | more)


def digest(client: TestClient, name: str) -> str:
    body = client.post("/v1/completions", json=ASKED | {"model": name}).json()
    return body["gossamer"]["adapters"][0]["digest"]


def test_models_lists_the_base_and_its_adapters(client: TestClient, learned: dict[str, gs.Adapter]) -> None:
    digest(client, "sql")
    listed = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    assert set(listed) == {"toy", "sql", "french"}
    assert listed["toy"]["parent"] is None
    assert listed["sql"]["parent"] == "toy"
    assert listed["sql"]["root"] == learned["sql"].digest
    about = listed["sql"]["gossamer"]
    assert about["rank"] == 2
    assert about["method"] == "lora"
    assert about["state"] == "memory"
    assert about["requests"] == 1
    assert listed["french"]["gossamer"]["state"] == "disk"
    for one in listed.values():
        Model.model_validate(one)
    assert client.get("/v1/models/sql").json() == listed["sql"]
    assert client.get("/v1/models/nothing").status_code == 404


def test_an_adapter_comes_is_replaced_and_goes(client: TestClient, folder: Path) -> None:
    new = adapter(5)
    new.save(folder / "new")
    assert client.post("/v1/completions", json=ASKED | {"model": "fresh"}).status_code == 404
    assert load(client, "fresh", "new").json()["digest"] == new.digest
    assert digest(client, "fresh") == new.digest
    assert load(client, "fresh", "sql").status_code == 400, "a name is not replaced by chance"
    assert load(client, "fresh", "sql", load_inplace=True).status_code == 200
    assert digest(client, "fresh") == digest(client, "sql")
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "fresh"}).status_code == 200
    assert client.post("/v1/completions", json=ASKED | {"model": "fresh"}).status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "fresh"}).status_code == 404
    assert load(client, "toy", "sql").status_code == 400, "the base's name"


def test_a_failed_load_leaves_what_was_there(client: TestClient, folder: Path, learned: dict[str, gs.Adapter]) -> None:
    adapter(6).save(folder / "broken")
    weights = folder / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    answer = load(client, "sql", "broken", load_inplace=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "adapter-file"
    assert str(folder) not in answer.text
    assert digest(client, "sql") == learned["sql"].digest


def test_only_what_lies_in_the_folder_is_loaded(client: TestClient, folder: Path) -> None:
    outside = folder.parent / "outside"
    adapter(7).save(outside)
    (folder / "link").symlink_to(outside)
    half = folder / "half"
    half.mkdir()
    (half / "adapter_config.json").write_text((outside / "adapter_config.json").read_text())
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    os.symlink("loop", folder / "loop")
    paths = [
        "../outside",
        str(outside),
        "link",
        "half",
        "loop",
        ".",
        "",
        "..",
        "/",
        "sql/../../outside",
        "\0",
        "a" * 999,
    ]
    said = {load(client, "x", path).text for path in paths if path}
    assert len(said - {load(client, "x", "nothing-there").text}) <= 1  # no control character in a path: said by field
    assert not any("outside" in text for text in said)
    assert client.post("/v1/completions", json=ASKED | {"model": "x"}).status_code == 404
    for name in ("../x", "x/y", "", "x" * 200, "a:b", "é"):
        assert load(client, name, "sql").status_code == 400


def test_names_mean_the_same_after_a_restart(client: TestClient, folder: Path, learned: dict[str, gs.Adapter]) -> None:
    new = adapter(5)
    new.save(folder / "new")
    assert load(client, "fresh", "new").json()["kept"]
    assert load(client, "sql", "new", load_inplace=True).json()["kept"]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "french"}).json()["kept"]
    with TestClient(create_app(engine(folder), name="toy", folder=folder), "http://localhost") as again:
        assert digest(again, "fresh") == digest(again, "sql") == new.digest
        assert again.post("/v1/completions", json=ASKED | {"model": "french"}).status_code == 404
        assert load(again, "french", "french").status_code == 200
        assert load(again, "sql", "sql", load_inplace=True).status_code == 200
    with TestClient(create_app(engine(folder), name="toy", folder=folder), "http://localhost") as again:
        assert digest(again, "french") == learned["french"].digest
        assert digest(again, "sql") == learned["sql"].digest


def test_tenants_load_nothing(guarded: TestClient) -> None:
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "sql"}),
        ("/v1/unload_lora_adapter", {"lora_name": "sql"}),
        ("/v1/unload_lora_adapter", {"lora_name": "nothing"}),
    ):
        answers = {guarded.post(path, json=body, headers=bearer(who)).status_code for who in ("one", "two")}
        assert answers == {403}
    assert guarded.get("/metrics", headers=bearer("one")).status_code == 403
    body = {"lora_name": "x", "lora_path": "sql"}
    assert guarded.post("/v1/load_lora_adapter", json=body, headers=bearer("admin")).status_code == 200


def test_a_bad_adapter_fails_its_own_requests(client: TestClient, folder: Path) -> None:
    weights = folder / "sql" / "adapter_model.safetensors"  # known by its folder, read when first asked for
    weights.write_bytes(weights.read_bytes()[:-50])
    answer = client.post("/v1/completions", json=ASKED | {"model": "sql"})
    assert answer.status_code == 400
    assert str(folder) not in answer.text
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["toy", "french"], "not offered any more"
    assert client.get("/v1/models/sql").json()["error"]["code"] == "adapter-file"
    assert client.post("/v1/completions", json=ASKED | {"model": "french"}).status_code == 200
    assert client.post("/v1/completions", json=ASKED | {"model": "toy"}).status_code == 200
    assert client.get("/ready").status_code == 200
    assert json.loads(answer.text)["error"]["code"] == "adapter-file"


@pytest.mark.parametrize("name", ["sql", "french"])
def test_metrics_count_by_adapter(client: TestClient, name: str) -> None:
    digest(client, name)
    client.post("/v1/completions", json=ASKED | {"model": "made-up-name"})
    text = client.get("/metrics").text
    assert f'gossamer_lora_requests_total{{adapter="{name}"}} 1.0' in text
    assert "made-up-name" not in text
    for line in ("gossamer_lora_registered 2.0", "gossamer_lora_in_memory 1.0", "gossamer_requests_waiting 0.0"):
        assert line in text
    assert 'gossamer_requests_total{route="/v1/completions",status="404"} 1.0' in text
    assert "gossamer_time_to_first_token_seconds_count 1.0" in text
    assert 'gossamer_tokens_total{kind="drawn"} 4.0' in text
