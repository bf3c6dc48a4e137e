"""The thread that owns the engine: starts, sleeps, serves everybody his own, and ends."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.serving.api.app import create_app
from gossamer.serving.api.worker import Worker
from gossamer.serving.engine import Engine
from gossamer.serving.sampling import Sampling
from gossamer.serving.sequence import Sequence
from tests.serving.api.conftest import adapter, engine


def test_it_lives_before_it_is_ready(folder: Path) -> None:
    gate = threading.Event()

    def make() -> Engine:
        gate.wait(20)
        return engine(folder)

    with TestClient(create_app(make, name="toy"), "http://localhost") as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        refused = client.post("/v1/completions", json={"model": "toy", "prompt": "x"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert client.get("/metrics").status_code == 200
        gate.set()
        end = time.monotonic() + 20
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < end
        assert client.post("/v1/completions", json={"model": "sql", "prompt": "x"}).status_code == 200


def test_it_sleeps_when_nobody_asks() -> None:
    async def main() -> None:
        worker = Worker(engine)
        worker.start()
        await worker.loaded.wait()
        job = await worker.submit([Sequence((1, 2, 3), {}, Sampling(max_tokens=2, ignore_eos=True))])
        assert sum([len(new.tokens) async for _, new in job]) == 2
        await asyncio.sleep(0.05)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.1
        await worker.close()
        assert not worker.thread.is_alive()

    asyncio.run(main())


def test_all_of_a_job_or_none_of_it() -> None:
    async def main() -> None:
        worker = Worker(engine)
        worker.start()
        await worker.loaded.wait()
        with pytest.raises(UsageError):
            await worker.submit([Sequence((1, 2, 3)), Sequence(())])
        assert worker.engine
        assert not await worker.call(lambda made: made.busy)
        assert not worker.watched
        await worker.close()

    asyncio.run(main())


def test_a_stop_tells_those_who_wait(folder: Path) -> None:
    async def main() -> None:
        worker = Worker(lambda: engine(folder))
        worker.start()
        await worker.loaded.wait()
        job = await worker.submit([Sequence((1, 2, 3), {"sql": 1.0}, Sampling(max_tokens=500, ignore_eos=True))])
        waiting = asyncio.ensure_future(_all(job))
        await asyncio.sleep(0.05)
        await worker.close()
        with pytest.raises(Exception, match="stopped"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(main())


async def _all(job: Any) -> list[Any]:
    return [one async for one in job]


def test_everybody_gets_his_own_while_adapters_come_and_go(
    folder: Path, learned: dict[str, gs.Adapter], listening: Callable[[Any], str]
) -> None:
    """Every answer is what the adapter whose digest it names makes alone."""
    values = {f"v{seed}": adapter(10 + seed) for seed in range(3)}
    for name, value in values.items():
        value.save(folder / name)
    by_digest = {value.digest: value for value in (*values.values(), *learned.values())}
    address = listening(create_app(engine(folder), name="toy", folder=folder))
    prompts = ["abc", "SELECT", "x", "Hello there"]
    seen: list[tuple[str, str | None, str]] = []
    failures: list[Any] = []

    async def ask(client: httpx.AsyncClient, draw: random.Random) -> None:
        prompt, model = draw.choice(prompts), draw.choice(["toy", "sql", "french", "moving"])
        body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        try:
            timeout = 0.02 if draw.random() < 0.1 else 60
            answer = await client.post("/v1/completions", json=body, timeout=timeout)
        except httpx.TimeoutException:
            return
        if answer.status_code == 404 and model == "moving":
            return
        if answer.status_code != 200:
            failures.append(answer.text)
            return
        named = answer.json()["gossamer"]["adapters"]
        seen.append((prompt, named[0]["digest"] if named else None, answer.json()["choices"][0]["text"]))

    async def churn(client: httpx.AsyncClient, draw: random.Random) -> None:
        for _ in range(15):
            if draw.random() < 0.3:
                await client.post("/v1/unload_lora_adapter", json={"lora_name": "moving"})
            body = {"lora_name": "moving", "lora_path": draw.choice([*values]), "load_inplace": True}
            assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 200
            await asyncio.sleep(0.01)

    async def main() -> None:
        draw = random.Random(0)
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            first = {"lora_name": "moving", "lora_path": "v0"}
            assert (await client.post("/v1/load_lora_adapter", json=first)).status_code == 200
            await asyncio.gather(churn(client, draw), *(ask(client, draw) for _ in range(80)))

    asyncio.run(main())
    assert not failures
    assert len(seen) > 50
    assert any(digest in {value.digest for value in values.values()} for _, digest, _ in seen)
    for prompt, digest, text in set(seen):
        with engine({"one": by_digest[digest]} if digest else {}) as alone:
            [reply] = alone.generate([prompt], ["one" if digest else None], max_tokens=6, ignore_eos=True)
        assert text == reply.text, f"{prompt} with {digest}"
