"""The way of a request, which chat, plain completions and embeddings share: each says where it differs.

who asks (the gate) -> its model and adapters -> its tokens -> its tenant's limits -> the engine -> the response
"""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from fastapi.responses import Response, StreamingResponse
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from gossamer.errors import NonFiniteError
from gossamer.serving.api.builders import ChatBuilder, ResponseBuilder, TextBuilder, adapter_header, adapter_uses
from gossamer.serving.api.faults import Refusal, refusal, unusable
from gossamer.serving.api.fields import RequestBody
from gossamer.serving.api.keys import Tenant, Visit
from gossamer.serving.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    StreamOptions,
)
from gossamer.serving.api.responses import EmbeddingList
from gossamer.serving.api.service import Service
from gossamer.serving.api.worker import SequenceGroup
from gossamer.serving.grammar import check_schema
from gossamer.serving.sequence import Reply, Sequence

Body = TypeVar("Body", bound=RequestBody)
GenerationBody = TypeVar("GenerationBody", bound=GenerationRequest)


class RequestHandler(ABC, Generic[Body]):
    """One request that a model answers."""

    visit: Visit

    def __init__(self, request: HttpRequest, body: Body) -> None:
        self.request, self.body = request, body
        self.service: Service = request.app.state.service
        self.tenant: Tenant = request.state.tenant

    @abstractmethod
    async def prepare(self) -> int:
        """Find its model and adapters and encode it; gives the tokens that it takes at most. Raises `Refusal`."""

    @abstractmethod
    async def respond(self) -> Response:
        """Run it, within its tenant's limits."""

    @abstractmethod
    def release(self) -> int:
        """Let go of what it holds, however it ended; gives the tokens that it took."""

    async def answer(self) -> Response:
        """All of it. Raises `Refusal` and what the engine raises."""
        self.visit = self.service.enter(self.tenant, await self.prepare())
        response = None
        try:
            response = await self.respond()
            return response
        finally:
            if not isinstance(response, EventStream):  # which leaves when it is over
                self.leave()

    def leave(self) -> None:
        """It counts no longer."""
        if not self.visit.over:
            self.service.leave(self.visit, self.release())


class GenerationHandler(RequestHandler[GenerationBody]):
    """A request for completions."""

    builder_type: ClassVar[type[ResponseBuilder]]

    sequences: list[Sequence]
    builder: ResponseBuilder
    adapters: dict[str, float]

    def __init__(self, request: HttpRequest, body: GenerationBody) -> None:
        super().__init__(request, body)
        self.base = self.service.completions
        self.group: SequenceGroup | None = None
        self.heard: dict[int, float] = {}  # sequence -> when something new of it came last
        self.digests: Mapping[str, str] = {}
        self.sampled = self.reused = 0

    @abstractmethod
    async def encode(self) -> list[tuple[int, ...]]:
        """Its prompts in tokens. Raises `Refusal`."""

    async def prepare(self) -> int:
        body, base = self.body, self.base
        self.service.check_ready()
        if base.wanted(body.model, body.lora).keys() - base.names:
            await self.service.until_gone(self.request, base.discover(self.tenant, body.model, body.lora))
        self.adapters = base.resolve(self.tenant, body.model, body.lora)
        prompts = await self.encode()
        if body.response_format and (schema := body.response_format.schema_text):
            await asyncio.to_thread(check_schema, schema)  # it may take a second, and the engine waits for nobody
        room = base.room(max(map(len, prompts)))
        if body.limit is not None and body.limit > room:
            message = f"The context has {base.context:,} tokens; the prompt leaves {room:,}, not {body.limit:,}."
            raise Refusal(400, message, "context_length_exceeded", param="max_tokens")
        most = body.limit or min(body.most_by_default or room, room)
        self.sequences = [
            Sequence(prompt, self.adapters, body.sampling(most, number), self.tenant.name)
            for prompt in prompts
            for number in range(body.n or 1)
        ]
        self.prompt_tokens = sum(map(len, prompts))
        self.builder = self.builder_type(body.model, self.adapters, base.tokenizer, body.likeliest is not None)
        return sum(len(one.prompt) + most for one in self.sequences)

    async def respond(self) -> Response:
        self.began = time.monotonic()
        news = self.news()
        first = await self.service.until_gone(self.request, anext(news))  # then the adapters' digests are known
        if self.body.stream:
            return EventStream(self, first, news, self.body.stream_options or StreamOptions())
        await self.service.until_gone(self.request, _exhaust(news))
        replies = [reply for one in self.sequences if (reply := one.reply)]
        return self.builder.whole(replies, self.usage, self.digests).response(headers=adapter_header(self.digests))

    async def news(self) -> AsyncIterator[tuple[int, Reply]]:
        """Hand it to the engine; gives what comes: which sequence, and what is new of it."""
        metrics = self.service.metrics
        self.group = await self.base.worker.submit(self.sequences)
        metrics.count_sequences(self.adapters, len(self.sequences))
        async for index, new in self.group:
            now = time.monotonic()
            if index not in self.heard:
                self.digests = {**self.digests, **new.digests}
                self.reused += new.reused
                metrics.first.observe(now - self.began)
                metrics.reused.inc(new.reused)
            elif new.tokens:
                metrics.between.observe((now - self.heard[index]) / len(new.tokens))
            self.heard[index] = now
            self.sampled += len(new.tokens)
            yield index, new

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far, as OpenAI names them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.sampled,
            "total_tokens": self.prompt_tokens + self.sampled,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }

    def release(self) -> int:
        if self.group:
            self.group.leave()
        read = sum(len(one.prompt) for one in self.sequences) if self.heard else 0
        self.service.metrics.tokens.labels("prompt").inc(read)
        self.service.metrics.tokens.labels("drawn").inc(self.sampled)
        return read + self.sampled


async def _exhaust(news: AsyncIterator[Any]) -> None:
    async for _ in news:
        pass


class ChatHandler(GenerationHandler[ChatRequest]):
    """/v1/chat/completions"""

    builder_type = ChatBuilder

    async def encode(self) -> list[tuple[int, ...]]:
        return [await self.base.encode_chat(self.body.messages, self.body, self.adapters)]


class CompletionHandler(GenerationHandler[CompletionRequest]):
    """/v1/completions"""

    builder_type = TextBuilder

    async def encode(self) -> list[tuple[int, ...]]:
        special = self.body.add_special_tokens is not False
        texts = self.body.prompts
        return [await self.base.encode(one, special) if isinstance(one, str) else tuple(one) for one in texts]


class EmbeddingHandler(RequestHandler[EmbeddingRequest]):
    """/v1/embeddings"""

    used = 0

    async def prepare(self) -> int:
        self.service.check_stopping()
        if self.service.vectors is None:
            raise Refusal(400, "This server has no model for embeddings.", "no_embeddings", param="model")
        self.base = self.service.vectors
        self.adapters = self.base.resolve(self.tenant, self.body.model)
        return self.body.most

    async def respond(self) -> Response:
        body, adapter = self.body, next(iter(self.adapters), None)
        try:
            work = self.base.embed(body.texts, adapter, body.dimensions)
            found = await self.service.until_gone(self.request, work)
        except NonFiniteError as error:
            if adapter is None:
                raise
            raise unusable(adapter, error) from None
        self.used = sum(found.tokens)
        write = _packed if body.encoding_format == "base64" else list
        rows = enumerate(found.vectors.tolist())
        response = EmbeddingList(
            object="list",
            model=body.model,
            data=[{"object": "embedding", "index": index, "embedding": write(row)} for index, row in rows],
            usage={"prompt_tokens": self.used, "total_tokens": self.used},
            gossamer=adapter_uses(self.adapters, found.digests),
        )
        return response.response(headers=adapter_header(found.digests))

    def release(self) -> int:
        return self.used


def _packed(row: list[float]) -> str:
    """As OpenAI's clients ask for it: float32, the lowest byte first, in base64."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


class EventStream(StreamingResponse):
    """Server-sent events of completions; when the client leaves, the request is over."""

    def __init__(
        self,
        handler: GenerationHandler[Any],
        first: tuple[int, Reply],
        rest: AsyncIterator[tuple[int, Reply]],
        options: StreamOptions,
    ) -> None:
        self.handler, self.first, self.rest = handler, first, rest
        self.usage = bool(options.include_usage)
        self.each = self.usage and bool(options.continuous_usage_stats)
        super().__init__(self._events(), media_type="text/event-stream", headers=adapter_header(handler.digests))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.handler
        try:
            async with asyncio.timeout(handler.service.limits.answering):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the client does not read, or the answer takes too long: the stream breaks off
        finally:
            if handler.group and handler.group.open:
                handler.service.metrics.cancelled.inc()
            handler.leave()

    async def _events(self) -> AsyncIterator[bytes]:
        handler = self.handler
        try:
            yield self._chunks(*self.first)
            async for index, new in self.rest:
                yield self._chunks(index, new)
            if self.usage:
                yield handler.builder.last(handler.usage, handler.digests).event
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status is sent: what is left is to say it in the stream
            yield refusal(error).body.event

    def _chunks(self, index: int, new: Reply) -> bytes:
        usage = {"usage": self.handler.usage if self.each else None} if self.usage else {}
        return b"".join(one.event for one in self.handler.builder.chunks(index, new, **usage))
