"""What the routes share: the bases, the requests that are under way, and whether new ones are taken."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from gossamer.errors import ArtefactError, NonFiniteError, UsageError
from gossamer.serving.api.backends import Backend, CompletionBackend, Vectors
from gossamer.serving.api.faults import ClientGone, Refusal, missing, not_ready, unusable
from gossamer.serving.api.keys import Visit
from gossamer.serving.api.limits import HttpLimits
from gossamer.serving.api.metrics import Metrics
from gossamer.serving.api.requests import LoadAdapterRequest
from gossamer.serving.api.responses import AdapterChangeResponse
from gossamer.serving.api.worker import Worker
from gossamer.serving.folder import Folder

Answer = TypeVar("Answer")


class Service:
    """One server.

    Attributes:
        draining: nothing new is taken.
        visits: requests under way, which count against their tenants' limits.
        loading: done when everything is there, or with what went wrong.
    """

    def __init__(
        self, completions: CompletionBackend, vectors: Vectors | None, limits: HttpLimits, metrics: Metrics
    ) -> None:
        self.completions, self.vectors, self.limits, self.metrics = completions, vectors, limits, metrics
        self.backends: list[Backend] = [completions, *([vectors] if vectors else [])]
        self.draining = False
        self.visits: set[Visit] = set()
        self.changing = asyncio.Lock()  # of two loads of a name, the second finds the first's
        self.loading: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def worker(self) -> Worker:
        """That has the engine."""
        return self.completions.worker

    @property
    def answering(self) -> int:
        """Requests under way."""
        return len(self.visits)

    def check_ready(self) -> None:
        """Raise `Refusal` unless new requests are taken."""
        self.check_stopping()
        if not self.worker.ready or (self.vectors and not self.vectors.embedder):
            raise not_ready()

    def check_stopping(self) -> None:
        """Raise `Refusal` when nothing new is taken."""
        if self.draining:
            raise Refusal(503, "The server is about to stop.", "stopping", after=5)

    async def until_gone(self, request: HttpRequest, work: Awaitable[Answer]) -> Answer:
        """Do something for a client that may leave. Raises `ClientGone`; `Refusal` when it takes too long."""
        doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({doing, leaving}, timeout=self.limits.answering, return_when="FIRST_COMPLETED")
            if doing.done():
                return doing.result()
            if leaving.done():
                raise ClientGone
            raise Refusal(504, "The answer was not ready in time.", "timeout")
        finally:
            leaving.cancel()
            if not doing.done():
                doing.cancel()
                await asyncio.wait({doing})

    def backend_of(self, model: str) -> Backend:
        """The base that a client's word for a model is of: that of completions where none knows it."""
        return self.vectors if self.vectors and self.vectors.knows(model) else self.completions

    async def load(self, wanted: LoadAdapterRequest) -> AdapterChangeResponse:
        """Read, check and offer an adapter from the server's folder. Raises `Refusal`, and leaves what was there."""
        self.check_ready()
        name = wanted.lora_name
        if name in [one.name for one in self.backends]:
            raise Refusal(400, "That is the name of a base.", "name_taken", param="lora_name")
        backend, shelf, folder = self._found(wanted.lora_path)
        async with self.changing:
            if any(one.knows(name) for one in self.backends if one is not backend):
                raise Refusal(400, "An adapter of the other base has this name.", "name_taken", param="lora_name")
            if backend.knows(name) and not wanted.load_inplace:
                message = f"An adapter {name!r} is there. Its replacement is loaded with load_inplace."
                raise Refusal(400, message, "name_taken", param="lora_name")
            try:
                digest = await backend.register(name, folder)
            except (ArtefactError, NonFiniteError, UsageError) as error:
                raise unusable(name, error, param="lora_path") from None
            kept = await asyncio.to_thread(shelf.keep, name, folder)
        return AdapterChangeResponse(status="ok", id=name, digest=digest, kept=kept)

    async def unload(self, name: str) -> AdapterChangeResponse:
        """Forget an adapter. Requests that use it go on with it. Raises `Refusal`."""
        self.check_ready()
        async with self.changing:
            backend = next((one for one in reversed(self.backends) if name in one.names), None)
            if backend is None:
                raise missing(name)
            await backend.unregister(name)
            kept = bool(backend.folder) and await asyncio.to_thread(backend.folder.keep, name, None)
        return AdapterChangeResponse(status="ok", id=name, kept=kept)

    def _found(self, path: str) -> tuple[Backend, Folder, Path]:
        """The adapter at a path, and the base in whose folder it lies. Raises `Refusal`: the same for other places."""
        shelves = [(one, one.folder) for one in self.backends if one.folder]
        found = [(one, shelf, place) for one, shelf in shelves if (place := shelf.inside(path))]
        if len({place for _, _, place in found}) > 1:
            message = "Both bases have an adapter there; give the whole path."
            raise Refusal(400, message, "two_choices", param="lora_path")
        if not found:
            message = "No adapter there, inside the server's folder of adapters."
            raise Refusal(400, message, "no_adapter", param="lora_path")
        return found[0]


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
