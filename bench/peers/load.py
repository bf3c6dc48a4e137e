"""A client that asks a server of OpenAI's API for many streams at once, and writes down when each token came."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Stream:
    """One answer: what it said, and when its pieces came, in seconds from the start of all."""

    model: str
    text: str = ""
    sent: float = 0.0
    came: list[float] = field(default_factory=list)
    tokens: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Load:
    """What a burst of requests took.

    Attributes:
        streams: in the order asked.
        seconds: from the first request to the last token.
    """

    streams: Sequence[Stream]
    seconds: float

    @property
    def throughput(self) -> float:
        """Answer tokens a second, reading the prompts included."""
        return sum(stream.tokens for stream in self.streams) / self.seconds

    @property
    def first(self) -> float:
        """Median seconds to the first token."""
        return statistics.median(stream.came[0] - stream.sent for stream in self.streams)

    @property
    def between(self) -> float:
        """Median seconds between tokens, once all have begun and while none has ended: what a decoding step takes.

        NaN where there is no such time, as they were answered one after the other.
        """
        begun, ended = max(stream.came[0] for stream in self.streams), min(stream.came[-1] for stream in self.streams)
        gaps = [
            later - earlier
            for stream in self.streams
            for earlier, later in zip(stream.came, stream.came[1:], strict=False)
            if begun <= earlier and later <= ended
        ]
        return statistics.median(gaps) if gaps else math.nan


async def burst(
    url: str,
    models: Sequence[str],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    key: str = "none",
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> Load:
    """Ask each model its prompt, all at once, greedily and past ends of sequences. Raises RuntimeError for a fault.

    Args:
        more: model -> further fields of its requests, for servers that choose an adapter otherwise.
    """
    limits = httpx.Limits(max_connections=len(models) + 1)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers) as client:
        start = time.perf_counter()
        asked = [
            _stream(client, model, prompt, max_tokens, start, (more or {}).get(model, {}))
            for model, prompt in zip(models, prompts, strict=True)
        ]
        streams = await asyncio.gather(*asked)
        seconds = time.perf_counter() - start
    if faults := [stream.fault for stream in streams if stream.fault]:
        raise RuntimeError(faults[0])
    return Load(streams, seconds)


async def _stream(
    client: httpx.AsyncClient,
    model: str,
    prompt: Sequence[int],
    max_tokens: int,
    start: float,
    more: Mapping[str, Any],
) -> Stream:
    found = Stream(model, sent=time.perf_counter() - start)
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            found.fault = f"{answer.status_code}: {(await answer.aread()).decode()[:300]}"
            return found
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("usage"):
                found.tokens = event["usage"]["completion_tokens"]
            if event.get("choices"):
                found.text += event["choices"][0]["text"]
                found.came.append(time.perf_counter() - start)
    return found
