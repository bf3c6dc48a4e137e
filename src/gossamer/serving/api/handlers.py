"""The way of a request, which chat, plain completions and embeddings share: each says where it differs.

who asks (the gate) -> its model and adapters -> its tokens -> its tenant's limits -> the engine -> the response
"""

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
from gossamer.serving.api.keys import Tenant
from gossamer.serving.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    RequestBody,
    StreamOptions,
    several,
)
from gossamer.serving.api.responses import CompletionUsage, EmbeddingList
from gossamer.serving.api.service import Service
from gossamer.serving.api.worker import SequenceGroup, Update
from gossamer.serving.grammar import check_schema
from gossamer.serving.sequence import Reply, Sequence

Body = TypeVar("Body", bound=RequestBody)
GenerationBody = TypeVar("GenerationBody", bound=GenerationRequest)


class RequestHandler(ABC, Generic[Body]):
    """One request that a model answers."""

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
        self.visit = self.tenant.allowance.enter(await self.prepare())
        self.service.visits.add(self.visit)
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
            self.visit.leave(self.release())
            self.service.visits.discard(self.visit)


class GenerationHandler(RequestHandler[GenerationBody]):
    """A request for completions."""

    builder_type: ClassVar[type[ResponseBuilder]]
    default_tokens: ClassVar[int | None] = None
    """Of an answer where the request does not say how many; None for as many as the context has room for."""

    def __init__(self, request: HttpRequest, body: GenerationBody) -> None:
        super().__init__(request, body)
        self.base = self.service.completions
        self.sequences: list[Sequence] = []
        self.group: SequenceGroup | None = None
        self.heard: dict[int, float] = {}  # sequence -> when something new of it came last
        self.digests: dict[str, str] = {}
        self.prompted = self.sampled = self.reused = 0

    @abstractmethod
    async def encode(self, adapters: Mapping[str, float]) -> list[tuple[int, ...]]:
        """Its prompts in tokens. Raises `Refusal`."""

    async def prepare(self) -> int:
        body, base = self.body, self.base
        self.service.check_ready()
        if base.wanted(body.model, body.lora).keys() - base.names:
            await self.service.until_gone(self.request, base.discover(self.tenant, body.model, body.lora))
        adapters = base.resolve(self.tenant, body.model, body.lora)
        prompts = await self.encode(adapters)
        if body.response_format and (schema := body.response_format.schema_text):
            await asyncio.to_thread(check_schema, schema)  # it may take a second, which the engine does not wait for
        room, said = base.room(max(map(len, prompts))), body.max_tokens
        if said is not None and said > room:
            message = f"The context has {base.context:,} tokens; the prompt leaves {room:,}, not {said:,}."
            raise Refusal(400, message, "context_length_exceeded", param="max_tokens")
        most = said or min(self.default_tokens or room, room)
        for prompt in prompts:
            drawn = (body.sampling(most, number) for number in range(body.n or 1))
            self.sequences += [Sequence(prompt, adapters, one, self.tenant.name) for one in drawn]
        self.prompted = sum(map(len, prompts))
        self.builder = self.builder_type(body.model, adapters, base.engine.tokenizer, body.likeliest is not None)
        return sum(len(one.prompt) + most for one in self.sequences)

    async def respond(self) -> Response:
        news = self._news()
        if self.body.stream:
            first = await self.service.until_gone(self.request, anext(news))  # then the adapters' digests are known
            return EventStream(self, first, news)
        await self.service.until_gone(self.request, _exhaust(news))
        replies = [reply for one in self.sequences if (reply := one.reply)]
        return self.builder.whole(replies, self.usage, self.digests).response(headers=adapter_header(self.digests))

    async def _news(self) -> AsyncIterator[Update]:
        """Hand it to the engine; gives what comes: which sequence, and what is new of it."""
        metrics, began = self.service.metrics, time.monotonic()
        self.group = await self.base.worker.submit(self.sequences)
        metrics.count_sequences(self.sequences[0].adapters, len(self.sequences))
        async for index, new in self.group:
            now = time.monotonic()
            if index not in self.heard:
                self.digests |= new.digests
                self.reused += new.reused
                metrics.first.observe(now - began)
                metrics.reused.inc(new.reused)
            elif new.tokens:
                metrics.between.observe((now - self.heard[index]) / len(new.tokens))
            self.heard[index] = now
            self.sampled += len(new.tokens)
            yield index, new

    @property
    def usage(self) -> CompletionUsage:
        """Tokens so far."""
        return {
            "prompt_tokens": self.prompted,
            "completion_tokens": self.sampled,
            "total_tokens": self.prompted + self.sampled,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }

    def release(self) -> int:
        if self.group:
            self.group.leave()
        read = sum(len(one.prompt) for one in self.sequences) if self.heard else 0
        self.service.metrics.tokens.labels("prompt").inc(read)
        self.service.metrics.tokens.labels("drawn").inc(self.sampled)
        return read + self.sampled


async def _exhaust(news: AsyncIterator[object]) -> None:
    async for _ in news:
        pass


class ChatHandler(GenerationHandler[ChatRequest]):
    """/v1/chat/completions."""

    builder_type = ChatBuilder

    async def encode(self, adapters: Mapping[str, float]) -> list[tuple[int, ...]]:
        return [await self.base.encode_chat(self.body.messages, self.body, adapters)]


class CompletionHandler(GenerationHandler[CompletionRequest]):
    """/v1/completions."""

    builder_type = TextBuilder
    default_tokens = 16

    async def encode(self, adapters: Mapping[str, float]) -> list[tuple[int, ...]]:
        special, texts = self.body.add_special_tokens is not False, several(self.body.prompt)
        return [await self.base.encode(one, special) if isinstance(one, str) else tuple(one) for one in texts]


class EmbeddingHandler(RequestHandler[EmbeddingRequest]):
    """/v1/embeddings."""

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
            work = self.base.embed(several(body.input), adapter, body.dimensions)
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

    def __init__(self, handler: GenerationHandler[Any], first: Update, rest: AsyncIterator[Update]) -> None:
        self.handler, self.first, self.rest = handler, first, rest
        self.options: StreamOptions = handler.body.stream_options or StreamOptions()
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
            if self.options.include_usage:
                yield handler.builder.last(handler.usage, handler.digests).event
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status is sent: what is left is to say it in the stream
            yield refusal(error).body.event

    def _chunks(self, index: int, new: Reply) -> bytes:
        options, handler = self.options, self.handler
        usage = {"usage": handler.usage if options.continuous_usage_stats else None} if options.include_usage else {}
        return b"".join(one.event for one in handler.builder.chunks(index, new, **usage))
