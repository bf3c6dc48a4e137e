"""Every route of /openapi.json with generated bodies: what is inside its schema, at its edges, and far outside.

Never a fault of the server's; a body is taken or refused as the schema says; every answer has the shape that is
documented for it, and says little.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving.api.app import create_app
from gossamer.serving.api.backends import Vectors
from gossamer.serving.api.limits import HttpLimits
from gossamer.serving.embedding import Embedder
from gossamer.serving.engine import Engine
from tests.serving.api.shapes import ANYTHING, Shapes, elsewhere

NAMES = {
    "model": ["toy", "sql", "toy:sql", "french", "nothing"],
    "lora_name": ["fresh", "other"],
    "lora_path": ["sql", "french", "nothing"],
}
"""Of these alone: what is there must be found for the rest of a body to matter."""
TEXTS = {"prompt": ["abc", "", [5, 6], [[5], [6, 7]], ["a", "b"]], "input": ["abc", "", [5, 6], [[5], [6]], ["a", "b"]]}
"""Of these where little else is asked."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, learned: Any) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, value in learned.items():
        value.save(folder / name)
    model = tiny("llama")
    model.config.max_position_embeddings = 24  # so that no answer is long
    engine = Engine((model, tiny_tokenizer()), folder)
    vectors = Vectors("vectors", lambda: Embedder((tiny("bert"), tiny_tokenizer())))
    app = create_app(engine, name="toy", folder=folder, bounds=HttpLimits(body=2**16), vectors=vectors)
    with TestClient(app, "http://localhost") as made:
        yield made


DOCUMENT = create_app(lambda: pytest.fail("nothing is served")).openapi()
SHAPES = Shapes(DOCUMENT)
POSTS = [path for path, methods in DOCUMENT["paths"].items() if "post" in methods]
GETS = [path for path, methods in DOCUMENT["paths"].items() if "get" in methods]


def schema_of(path: str) -> Mapping[str, Any]:
    return DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def bodies(path: str) -> st.SearchStrategy[Any]:
    """Inside the schema; or with a part replaced, taken away or added."""
    schema = schema_of(path)
    fields = SHAPES.whole(schema)["properties"]
    known = NAMES | ({"model": ["vectors", "nothing"]} if path == "/v1/embeddings" else {})
    names = {name: st.sampled_from(some) for name, some in known.items() if name in fields}
    good = st.builds(lambda body, named: body | named, SHAPES.inside(schema), st.fixed_dictionaries(names))
    plain = {name: part for name, part in fields.items() if name in SHAPES.whole(schema).get("required", ())}
    texts = {name: st.sampled_from(some) for name, some in TEXTS.items() if name in fields}
    few = st.fixed_dictionaries({name: SHAPES.inside(part) for name, part in plain.items()} | texts | names)
    return st.one_of(
        few,
        good,
        st.builds(elsewhere, few, st.integers(0, 50), ANYTHING),
        st.builds(elsewhere, good, st.integers(0, 50), ANYTHING),
        st.builds(lambda body, name, value: body | {name: value}, few, st.sampled_from([*fields]), ANYTHING),
        st.builds(lambda body, name, value: body | {name: value}, few, st.text(max_size=8), ANYTHING),
        st.builds(lambda body, name: {one: body[one] for one in body if one != name}, good, st.sampled_from([*fields])),
        ANYTHING,
    )


def check(client: TestClient, path: str, body: Any) -> int:
    """Ask, and hold the answer against the document; gives the status."""
    began = time.monotonic()
    answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert time.monotonic() - began < 10
    if answer.status_code != 200:
        refused(path, "post", answer)
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert "text/event-stream" in DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert events[-1] == "[DONE]"
        assert all("error" not in json.loads(event) for event in events[:-1])
    else:
        told(path, "post", answer)
    allowed = SHAPES.allows(schema_of(path), body)
    if not allowed:
        assert answer.status_code == 400, (body, answer.text)
    elif answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_request":
        assert "Value error" in answer.text, (body, answer.text)  # what two fields must agree on is in no schema
    return answer.status_code


def told(path: str, method: str, answer: Any) -> None:
    """It is what the route says it tells."""
    [(kind, content)] = [
        (kind, content)
        for kind, content in DOCUMENT["paths"][path][method]["responses"]["200"]["content"].items()
        if kind != "text/event-stream"
    ]
    assert answer.headers["content-type"].startswith(kind)
    value = answer.json() if kind == "application/json" else answer.text
    assert SHAPES.allows(content["schema"], value), answer.text[:2000]


def refused(path: str, method: str, answer: Any) -> None:
    """It is the documented shape of errors, of the client's own fault, and short."""
    assert 400 <= answer.status_code < 500, answer.text
    [(kind, content)] = DOCUMENT["paths"][path][method]["responses"]["4XX"]["content"].items()
    assert answer.headers["content-type"] == kind
    assert SHAPES.allows(content["schema"], answer.json()), answer.text
    assert len(answer.text) < 2000


def fuzz(client: TestClient, path: str, count: int) -> None:
    seen: list[int] = []

    @settings(max_examples=count)
    @given(bodies(path))
    def run(body: Any) -> None:
        seen.append(check(client, path, body))

    run()
    assert {200, 400} <= set(seen), "some were taken and some refused"


@pytest.mark.parametrize("path", POSTS)
def test_a_few_bodies(client: TestClient, path: str) -> None:
    fuzz(client, path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTS)
def test_many_bodies(client: TestClient, path: str) -> None:
    fuzz(client, path, 5000 // len(POSTS) + 1)


@pytest.mark.parametrize("path", GETS)
def test_what_is_only_read(client: TestClient, path: str) -> None:
    for name in ("sql", "toy", "nothing", "toy:sql", "%00", "..", "%2e%2e/x", "%ed%a0%80", "a" * 3000, "é", "a/b/c"):
        answer = client.get(path.replace("{name}", name), params={"limit": "x", name: name})
        if answer.status_code == 200:
            told(path, "get", answer)
        else:
            refused(path, "get", answer)


def test_the_document_names_what_is_sent() -> None:
    """No route is left that promises nothing, nor one that promises another error than ours."""
    for path, methods in DOCUMENT["paths"].items():
        for method, about in methods.items():
            assert set(about["responses"]) == {"200", "4XX", "5XX"}, (method, path)
            for kind, content in about["responses"]["200"]["content"].items():
                assert content["schema"], (method, path, kind)
            for status in ("4XX", "5XX"):
                [content] = about["responses"][status]["content"].values()
                assert content["schema"]["$ref"].endswith("/ErrorResponse")
    text = json.dumps(DOCUMENT["components"])
    assert '"ge"' not in text, "a bound that JSON schema does not know"
    assert '"le"' not in text
