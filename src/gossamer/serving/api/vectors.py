"""The base that makes vectors, by an `Embedder` in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gossamer.serving.api.backends import Backend
from gossamer.serving.api.faults import Refusal
from gossamer.serving.api.keys import Tenant
from gossamer.serving.api.responses import ModelCard
from gossamer.serving.embedding import Embedder, Embeddings
from gossamer.serving.folder import Folder

WAITING = 64
"""Requests that may wait for the one thread."""


class Vectors(Backend):
    """An embedder for the app.

    Args:
        name: of its base, for clients.
        make: gives the embedder; called in its thread when the app starts.
    """

    def __init__(self, name: str, make: Callable[[], Embedder]) -> None:
        super().__init__(name)
        self.make = make
        self.embedder: Embedder | None = None
        self.waiting = 0

    async def start(self) -> None:
        """Load it. Raises what loading raises."""
        self.embedder = await self.aside(self.make)

    @property
    def names(self) -> Mapping[str, str]:
        return self.embedder.digests if self.embedder else {}

    @property
    def folder(self) -> Folder | None:
        return self.embedder.folder if self.embedder else None

    async def register(self, name: str, folder: Path) -> str:
        assert self.embedder
        await self.aside(self.embedder.register, name, folder)
        return self.names[name]

    async def unregister(self, name: str) -> None:
        assert self.embedder
        await self.aside(self.embedder.unregister, name)

    async def cards(self, tenant: Tenant) -> list[ModelCard]:
        if self.embedder is None:
            return []
        mine = [self.card(name, digest) for name, digest in sorted(self.names.items()) if tenant.may(name)]
        return [self.card(self.name), *mine]

    async def adapter_card(self, name: str) -> ModelCard:
        return self.card(name, self.names[name])

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    async def embed(self, texts: list[Any], adapter: str | None, dimensions: int | None) -> Embeddings:
        """Vectors of texts. Raises what `Embedder.embed` raises, and `Refusal` when too many wait."""
        if self.waiting >= WAITING or self.embedder is None:
            raise Refusal(429, "Too many requests wait.", "queue_full", after=1)
        embedder, self.waiting = self.embedder, self.waiting + 1
        try:
            return await self.aside(lambda: embedder.embed(texts, adapter, dimensions=dimensions))
        finally:
            self.waiting -= 1
