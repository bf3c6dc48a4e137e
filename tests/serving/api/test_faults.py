"""What is told of a fault: its kind, and never a place on this machine."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from gossamer import errors
from gossamer.serving.api.app import create_app
from gossamer.serving.api.faults import refusal, unusable
from tests.serving.api.conftest import adapter, engine

KINDS = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, errors.GossamerError)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["/srv/a secret/ads", "secret/ads", r"C:\secret\ads"])
def test_no_error_tells_a_path(kind: type[errors.GossamerError], place: str) -> None:
    error = kind("wrong", where=f"{place}/x.json", got=f"{place}: no", expected=place, hint=f"see {place}")
    for found in (refusal(error), unusable("sql", error)):
        assert "secret" not in str(found.body)
        assert "secret" not in str(found.headers)


def test_one_name_for_base_and_adapter_does_not_start(folder: Path) -> None:
    adapter(3).save(folder / "toy")
    with pytest.raises(errors.UsageError, match="one name for two models"):
        create_app(engine(folder), name="toy", folder=folder)


def test_what_cannot_be_served_says_so_by_its_code(folder: Path) -> None:
    for name in ("pickle", "cut"):
        adapter(4).save(folder / name)
    (folder / "pickle" / "adapter_model.safetensors").rename(folder / "pickle" / "adapter_model.bin")
    weights = folder / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    asked = {"prompt": "x", "max_tokens": 1}
    with TestClient(create_app(engine(folder), name="toy", folder=folder), "http://localhost") as client:
        listed = {one["id"] for one in client.get("/v1/models").json()["data"]}
        for name, code in (("pickle", "unsupported"), ("cut", "adapter-file")):
            answer = client.post("/v1/completions", json=asked | {"model": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
            assert str(folder) not in answer.text
        adapter(5).save(folder / "late")
        assert client.post("/v1/completions", json=asked | {"model": "late"}).status_code == 200
    assert listed == {"toy", "sql", "french"}
