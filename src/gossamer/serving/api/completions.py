"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from gossamer.serving.api import told
from gossamer.serving.api.answers import Form, Usage, named
from gossamer.serving.api.faults import Refusal, refusal
from gossamer.serving.api.keys import Tenant, Visit
from gossamer.serving.api.schema import Chat, Completion, Generation, StreamOptions
from gossamer.serving.api.service import Service
from gossamer.serving.api.worker import Job, Progress
from gossamer.serving.grammar import check_schema
from gossamer.serving.sequence import Reply, Sequence

PLAIN = 16
"""Tokens of a plain completion that does not say how many, as with OpenAI."""

router = APIRouter()


@router.post("/v1/chat/completions", response_model=told.ChatCompletion, responses=told.STREAMS)
async def chat(asked: Chat, request: HttpRequest) -> Response:
    """Go on with a conversation."""
    service: Service = request.app.state.service
    service.check_ready()
    adapters = await service.found(request, asked.model, asked.lora)
    prompt = await service.encode_chat(asked.messages, asked, adapters)
    return await _answer(request, asked, adapters, [prompt], asked.max_completion_tokens or asked.max_tokens)


@router.post("/v1/completions", response_model=told.TextCompletion, responses=told.STREAMS)
async def completions(asked: Completion, request: HttpRequest) -> Response:
    """Go on with texts, or with token ids."""
    service: Service = request.app.state.service
    service.check_ready()
    adapters = await service.found(request, asked.model, asked.lora)
    special = asked.add_special_tokens is not False
    prompts = [await service.encode(one, special) if isinstance(one, str) else tuple(one) for one in asked.prompts]
    return await _answer(request, asked, adapters, prompts, asked.max_tokens)


async def _answer(
    request: HttpRequest,
    asked: Generation,
    adapters: Mapping[str, float],
    prompts: list[tuple[int, ...]],
    max_tokens: int | None,
) -> Response:
    service, tenant = request.app.state.service, request.state.tenant
    if asked.response_format and (schema := asked.response_format.schema_text):
        await asyncio.to_thread(check_schema, schema)  # it may take a second, and the engine waits for nobody
    room = service.room(max(map(len, prompts)))
    if max_tokens is not None and max_tokens > room:
        message = f"The context has {service.context:,} tokens; the prompt leaves {room:,}, not {max_tokens:,}."
        raise Refusal(400, message, "context_length_exceeded", param="max_tokens")
    most = max_tokens or (room if isinstance(asked, Chat) else min(PLAIN, room))
    count = asked.n or 1
    wanted = [
        Sequence(prompt, adapters, asked.sampling(most, number), tenant.name)
        for prompt in prompts
        for number in range(count)
    ]
    form = Form(isinstance(asked, Chat), asked.model, adapters, service.tokenizer, asked.wants_logprobs)
    run = Run(service, tenant, form, wanted, Usage(sum(map(len, prompts))))
    try:
        first = await service.until_gone(request, run.begin())
        if not asked.stream:
            answers = await service.until_gone(request, run.collect())
            return JSONResponse(form.whole(answers, run.usage, run.digests), headers=named(run.digests))
    except BaseException:
        run.leave()
        raise
    finally:
        if not asked.stream:
            run.leave()
    return Events(run, first, asked.stream_options or StreamOptions())


class Run:
    """A request from the moment it counts against its tenant's limits until it is over."""

    def __init__(self, service: Service, tenant: Tenant, form: Form, wanted: list[Sequence], usage: Usage) -> None:
        self.service, self.form, self.wanted, self.usage = service, form, wanted, usage
        self.began = time.monotonic()
        self.told: dict[int, float] = {}  # sequence -> when it was last heard of
        self.digests: Mapping[str, str] = {}
        self.job: Job | None = None
        most = sum(len(one.prompt) + one.sampling.max_tokens for one in wanted)
        self.visit: Visit = tenant.allowance.enter(most)
        service.answering += 1

    async def begin(self) -> Progress:
        """Hand it to the engine, and wait for the first that it brings: then the adapters' digests are known."""
        self.job = await self.service.worker.submit(self.wanted)
        self.service.metrics.asked(self.wanted[0].adapters, len(self.wanted))
        self.progress = aiter(self.job)
        return await self._next()

    async def _next(self) -> Progress:
        progress = await anext(self.progress)
        self._count(progress)
        return progress

    async def __aiter__(self) -> AsyncIterator[Progress]:
        while self.job and self.job.open:
            yield await self._next()

    async def collect(self) -> list[Reply]:
        """All of it."""
        async for _ in self:
            pass
        return [one.reply or Reply() for one in self.wanted]

    def _count(self, progress: Progress) -> None:
        metrics, now, new = self.service.metrics, time.monotonic(), progress.reply
        if progress.index not in self.told:
            self.digests = dict(self.digests) | dict(new.digests)
            self.usage.reused += new.reused
            metrics.first.observe(now - self.began)
            metrics.reused.inc(new.reused)
        elif new.tokens:
            metrics.between.observe((now - self.told[progress.index]) / len(new.tokens))
        self.told[progress.index] = now
        self.usage.drawn += len(new.tokens)

    def leave(self) -> None:
        """It is over, however it ended; what still runs is cancelled."""
        if self.visit.over:
            return
        if self.job:
            self.job.leave()
        read = sum(len(one.prompt) for one in self.wanted) if self.told else 0
        self.visit.used = read + self.usage.drawn
        self.visit.leave()
        self.service.answering -= 1
        self.service.metrics.tokens.labels("prompt").inc(read)
        self.service.metrics.tokens.labels("drawn").inc(self.usage.drawn)


class Events(StreamingResponse):
    """Server-sent events of a run; when the client leaves, the run ends."""

    def __init__(self, run: Run, first: Progress, options: StreamOptions) -> None:
        self.run, self.usage = run, bool(options.include_usage)
        self.each = self.usage and bool(options.continuous_usage_stats)
        super().__init__(self._events(first), media_type="text/event-stream", headers=named(run.digests))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.run.service.bounds.answering):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the client does not read, or the answer takes too long: the stream breaks off
        finally:
            if self.run.job and self.run.job.open:
                self.run.service.metrics.cancelled.inc()
            self.run.leave()

    async def _events(self, first: Progress) -> AsyncIterator[bytes]:
        begun = {first.index}
        try:
            yield self._pieces(first, True)
            async for progress in self.run:
                yield self._pieces(progress, progress.index not in begun)
                begun.add(progress.index)
            if self.usage:
                yield self._event(self.run.form.last(self.run.usage, self.run.digests))
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status is sent: what is left is to say it in the stream
            yield self._event(refusal(error).body)

    def _pieces(self, progress: Progress, first: bool) -> bytes:
        return b"".join(map(self._event, self.run.form.chunks(progress, first)))

    def _event(self, value: Mapping[str, Any]) -> bytes:
        if self.usage and value.get("choices"):
            value = {**value, "usage": self.run.usage.fields() if self.each else None}
        return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
