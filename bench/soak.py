"""Ten minutes of mixed load, adapters loaded and unloaded each second: what grows, and how long do requests take?

Streams and whole answers, several answers to a question, clients that leave in the middle, adapters asked for by a few
names much more than by others, against `gossamer serve` in a process of its own. Its memory, threads and open files are
read from the system; its slots and adapters from /metrics. GOSSAMER_SOAK sets the seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

import gossamer as gs
from bench.common import Row, report
from bench.serve import BASE, TARGETS, _adapter
from bench.serve_http import ours, popularity

SECONDS, CLIENTS, ADAPTERS = int(os.environ.get("GOSSAMER_SOAK", "600")), 12, 8


def measure() -> list[Row]:
    """The load, and what was seen every few seconds."""
    gs.fetch(BASE)
    model, _ = gs.load_base(BASE, dtype="fp32")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(ADAPTERS):
            _adapter(model, TARGETS["q, v"], number).save(folder / f"a{number}")
        shutil.copytree(folder / "a0", folder / "other")
        del model
        with ours(folder, 16) as url:
            return asyncio.run(_soak(url))


async def _soak(url: str) -> list[Row]:
    end = time.monotonic() + SECONDS
    took: list[float] = []
    counts: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        clients = [_client(client, number, end, took, counts) for number in range(CLIENTS)]
        watching = asyncio.ensure_future(_watch(client, end))
        await asyncio.gather(_loader(client, end, counts), *clients)
        seen = await watching
        await asyncio.sleep(2)
        quiet = await _metrics(client)
    third = len(seen) // 3
    early, late = ([one["resident MB"] for one in part] for part in (seen[third : 2 * third], seen[2 * third :]))
    assert quiet["gossamer_requests_running"] == 0, "slots leak"
    return [
        {
            "seconds": SECONDS,
            "answers": counts["whole"] + counts["streamed"],
            "left in the middle": counts["left"],
            "loads and unloads": counts["loads"],
            "refused": counts["refused"],
            "median s": round(statistics.median(took), 2),
            "p99 s": round(statistics.quantiles(took, n=100)[98], 2),
            "resident MB, second third": round(statistics.median(early)),
            "resident MB, last third": round(statistics.median(late)),
            "open files": f"{seen[third]['files']} then {seen[-1]['files']}",
            "threads": f"{seen[third]['threads']} then {seen[-1]['threads']}",
        }
    ]


async def _client(client: httpx.AsyncClient, number: int, end: float, took: list[float], counts: Counter[str]) -> None:
    chance = random.Random(number)
    while time.monotonic() < end:
        name = f"a{popularity('skewed', 1, ADAPTERS)[0]}" if chance.random() < 0.2 else f"a{chance.randrange(ADAPTERS)}"
        body = {
            "model": chance.choice([name, name, name, "base", "other"]),
            "prompt": [chance.randrange(40_000) for _ in range(chance.choice([4, 30, 100]))],
            "max_tokens": chance.choice([1, 8, 24]),
            "temperature": chance.choice([0, 1]),
            "n": chance.choice([1, 1, 1, 3]),
            "stream": chance.random() < 0.6,
        }
        start = time.monotonic()
        if body["stream"]:
            leaves = chance.random() < 0.2
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                counts["refused"] += answer.status_code >= 400
                async for _ in answer.aiter_lines():
                    if leaves and chance.random() < 0.2:
                        break
            counts["left" if leaves else "streamed"] += 1
        else:
            answer = await client.post("/v1/completions", json=body)
            counts["refused"] += answer.status_code >= 400
            counts["whole"] += 1
        took.append(time.monotonic() - start)


async def _loader(client: httpx.AsyncClient, end: float, counts: Counter[str]) -> None:
    """Forget an adapter and load it again, every second."""
    while time.monotonic() < end:
        for path in ("/v1/unload_lora_adapter", "/v1/load_lora_adapter"):
            body = {"lora_name": "other"} | ({"lora_path": "other"} if "un" not in path else {})
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            counts["loads"] += 1
            await asyncio.sleep(0.5)


async def _watch(client: httpx.AsyncClient, end: float) -> list[dict[str, float]]:
    seen = []
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen.append(_process(_server()))
        await asyncio.sleep(3)
    return seen


def _server() -> int:
    """The server is this process's child."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
    return int(children[0])


def _process(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE)}
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"resident MB": found["VmRSS"] / 1024, "threads": found["Threads"], "files": files}


async def _metrics(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^(\w+) ([\d.e+-]+)$", text, re.MULTILINE)}


if __name__ == "__main__":
    report("soak", "Does anything grow in ten minutes of mixed load?", measure)
