"""/v1/embeddings, by an `Embedder` in a thread of its own."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HttpRequest

from gossamer.errors import NonFiniteError
from gossamer.serving.api import told
from gossamer.serving.api.answers import named
from gossamer.serving.api.faults import Refusal, missing, unusable
from gossamer.serving.api.keys import Tenant
from gossamer.serving.api.schema import Embedding
from gossamer.serving.embedding import Embedder, Embeddings
from gossamer.serving.folder import Folder

router = APIRouter()

WAITING = 64
"""Requests that may wait for the one thread."""


class Vectors:
    """An embedder for the app.

    Args:
        name: of its base, for clients.
        make: gives the embedder; called in its thread when the app starts.
    """

    def __init__(self, name: str, make: Callable[[], Embedder]) -> None:
        self.name, self.make = name, make
        self.thread = ThreadPoolExecutor(1, "vectors")
        self.embedder: Embedder | None = None
        self.waiting = 0

    async def start(self) -> None:
        """Load it. Raises what loading raises."""
        self.embedder = await asyncio.get_running_loop().run_in_executor(self.thread, self.make)

    @property
    def digests(self) -> Mapping[str, str]:
        """Of its adapters, by name."""
        return self.embedder.digests if self.embedder else {}

    @property
    def folder(self) -> Folder | None:
        """That its adapters came from, and that more may come from."""
        return self.embedder.folder if self.embedder else None

    def names(self) -> list[str]:
        """Of the base and its adapters, once it is there."""
        return [self.name, *sorted(self.digests)] if self.embedder else []

    def knows(self, model: str) -> bool:
        """Whether this is the base's name, or that of one of its adapters."""
        return model == self.name or model.removeprefix(self.name + ":") in self.digests

    async def register(self, name: str, folder: Path) -> str:
        """Let a name mean what lies in a folder; gives its digest. Raises what `Embedder.register` raises."""
        embedder = self.embedder
        assert embedder
        await asyncio.get_running_loop().run_in_executor(self.thread, embedder.register, name, folder)
        return embedder.digests[name]

    async def unregister(self, name: str) -> None:
        """Forget a name."""
        embedder = self.embedder
        assert embedder
        await asyncio.get_running_loop().run_in_executor(self.thread, embedder.unregister, name)

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown(cancel_futures=True)

    def chosen(self, tenant: Tenant, model: str) -> str | None:
        """The adapter that is asked for. Raises `Refusal`: the same for unknown ones and those not his."""
        if model == self.name:
            return None
        name = model.removeprefix(self.name + ":")
        if not (name in self.digests) & tenant.may(name):
            raise missing(model)
        return name

    async def embed(self, texts: list[Any], adapter: str | None, dimensions: int | None) -> Embeddings:
        """Vectors of texts. Raises what `Embedder.embed` raises, and `Refusal` when too many wait."""
        if self.waiting >= WAITING or self.embedder is None:
            raise Refusal(429, "Too many requests wait.", "queue_full", after=1)
        embedder, self.waiting = self.embedder, self.waiting + 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self.thread, lambda: embedder.embed(texts, adapter, dimensions=dimensions)
            )
        finally:
            self.waiting -= 1


@router.post("/v1/embeddings", response_model=told.Embeddings)
async def embeddings(asked: Embedding, request: HttpRequest) -> Response:
    """Vectors of texts or token ids, from the base or from one of its adapters."""
    service, tenant = request.app.state.service, request.state.tenant
    service.check_stopping()
    vectors: Vectors | None = service.vectors
    if vectors is None:
        raise Refusal(400, "This server has no model for embeddings.", "no_embeddings", param="model")
    adapter = vectors.chosen(tenant, asked.model)
    visit = tenant.allowance.enter(asked.most)
    service.answering += 1
    try:
        found = await service.until_gone(request, vectors.embed(asked.texts, adapter, asked.dimensions))
        visit.used = sum(found.tokens)
    except NonFiniteError as error:
        if adapter is None:
            raise
        raise unusable(adapter, error) from None
    finally:
        visit.leave()
        service.answering -= 1
    packed = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(row) if packed else row}
        for index, row in enumerate(found.vectors.tolist())
    ]
    made_by = [{"id": name, "scale": 1.0, "digest": digest} for name, digest in found.digests.items()]
    answer = {
        "object": "list",
        "model": asked.model,
        "data": data,
        "usage": {"prompt_tokens": visit.used, "total_tokens": visit.used},
        "gossamer": {"adapters": made_by},
    }
    return JSONResponse(answer, headers=named(found.digests))


def _packed(row: list[float]) -> str:
    """As OpenAI's clients ask for it: float32, the lowest byte first, in base64."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
