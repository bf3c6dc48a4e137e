"""What the routes share: the engine's worker, who may what, and how a request finds its adapters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from gossamer.errors import GossamerError, UsageError
from gossamer.serving.api.faults import Refusal, missing, unusable
from gossamer.serving.api.fetching import Fetching
from gossamer.serving.api.keys import Keyring, Tenant
from gossamer.serving.api.limits import Bounds
from gossamer.serving.api.metrics import Metrics
from gossamer.serving.api.prompts import rendered, too_long, within
from gossamer.serving.api.schema import Message, Templated, Weighted
from gossamer.serving.api.vectors import Vectors
from gossamer.serving.api.worker import Worker
from gossamer.serving.chat_format import ChatFormat, common_format
from gossamer.serving.folder import Folder
from gossamer.serving.vocabulary import encoded

Result = TypeVar("Result")


class Gone(Exception):
    """The client left; nobody reads an answer."""


class Service:
    """One server.

    Args:
        worker: has the engine. keyring: who may. bounds: of requests.
        name: of the base, for clients.
        folder: where adapters that are loaded while serving must lie; None allows none.
        vectors: answers /v1/embeddings, if anything does.
        fetching: brings adapters of the hub, if any are allowed.
    """

    def __init__(
        self,
        worker: Worker,
        keyring: Keyring,
        bounds: Bounds,
        metrics: Metrics,
        name: str,
        folder: Folder | None,
        vectors: Vectors | None,
        fetching: Fetching | None = None,
    ) -> None:
        self.worker, self.keyring, self.bounds, self.name, self.folder = worker, keyring, bounds, name, folder
        self.vectors, self.metrics, self.fetching = vectors, metrics, fetching
        self.draining = False
        self.answering = 0
        self.forgotten: set[str] = set()  # names that were unloaded, whatever their subfolders hold
        self.started = int(time.time())
        self.texts = ThreadPoolExecutor(1, "texts")  # a tokenizer is not for several threads at a time
        self.reading = asyncio.Lock()
        self.loading: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # Who and whether -------------------------------------------------------------------------------------------

    def check_ready(self) -> None:
        """Raise `Refusal` unless new requests are taken."""
        self.check_stopping()
        if not self.worker.ready or (self.vectors and not self.vectors.embedder):
            raise Refusal(503, "The model is not there.", "not_ready", after=5)

    def check_stopping(self) -> None:
        """Raise `Refusal` when nothing new is taken."""
        if self.draining:
            raise Refusal(503, "The server is about to stop.", "stopping", after=5)

    async def found(self, request: HttpRequest, model: str, lora: Sequence[Weighted] | None = None) -> dict[str, float]:
        """What `chosen` gives, after those that only the hub has were fetched. Raises `Refusal`; Gone."""
        tenant = request.state.tenant
        for name in sorted(self._wanted(model, lora).keys() - self.worker.names):
            if tenant.may(name):
                await self._notice(name)
        names = self._wanted(model, lora).keys() - self.worker.names
        if self.fetching and names and all(tenant.may(name) & self.fetching.hub.allows(name) for name in names):
            for name in sorted(names):
                await self.until_gone(request, self.fetching.fetch(name))
        return self.chosen(tenant, model, lora)

    def chosen(self, tenant: Tenant, model: str, lora: Sequence[Weighted] | None = None) -> dict[str, float]:
        """Adapter -> weight of a request. Unknown ones and those that are not his are the same to a tenant.

        Raises: Refusal.
        """
        wanted = self._wanted(model, lora)
        for name in wanted:
            if tenant.may(name) and name not in self.worker.names and (fault := self.fault_of(name)):
                raise unusable(name, fault)
            if not (name in self.worker.names) & tenant.may(name):
                raise missing(name if model == self.name else model)
        return wanted

    def fault_of(self, name: str) -> GossamerError | None:
        """Why an adapter could not be used, if so."""
        return self.worker.engine.store.fault_of(name) if self.worker.engine else None

    async def _notice(self, name: str) -> None:
        """Make a name known whose subfolder came after the start."""
        folder, vectors = self.folder, self.vectors
        if folder is None or name in self.forgotten or (vectors and vectors.knows(name)):
            return
        if found := await asyncio.to_thread(folder.named, name):
            async with self.reading:
                if name not in self.worker.names:
                    await self.worker.call(lambda engine: engine.store.offer(name, found), renames=True)

    def _wanted(self, model: str, lora: Sequence[Weighted] | None) -> dict[str, float]:
        if model == self.name:
            wanted = {one.id: one.scale for one in lora or ()}
            if len(wanted) < len(lora or ()):
                raise Refusal(400, "An adapter stands twice in the mix.", "twice", param="lora")
        elif lora is not None:
            raise Refusal(400, f"A mix goes with the base's name, {self.name!r}.", "two_choices", param="lora")
        else:
            wanted = {model.removeprefix(self.name + ":"): 1.0}
        return wanted

    # Texts -----------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The engine's."""
        self.check_ready()
        assert self.worker.engine
        return self.worker.engine.tokenizer

    async def encode(self, text: str, special: bool = True, *, bounded: bool = True) -> tuple[int, ...]:
        """Token ids of a text, with what the tokenizer puts around texts if `special`.

        Raises: Refusal for one that is `bounded` and far over the context.
        """
        tokenizer, context = self.tokenizer, self.context
        if bounded:
            return await self._aside(lambda: within(tokenizer, text, special, context))
        return await self._aside(lambda: encoded(tokenizer, text, special))

    async def encode_chat(
        self, messages: Sequence[Message], how: Templated, adapters: Iterable[str] = (), *, bounded: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a conversation that the assistant shall go on with, as its adapters' own template writes it.

        Raises: UsageError; Refusal.
        """
        tokenizer = self.tokenizer
        chat_format = await self._aside(lambda: self._chat_format([*adapters]))
        text = await self._aside(lambda: rendered(tokenizer, messages, how, chat_format))
        return await self.encode(text, False, bounded=bounded)

    def _chat_format(self, adapters: Sequence[str]) -> ChatFormat:
        """How their chats are written. Raises `Refusal`; UnsupportedError for a mix of several templates."""
        assert self.worker.engine
        store, found = self.worker.engine.store, []
        for name in adapters:
            try:
                found.append(store.chat_format_of(name))
            except GossamerError as error:
                raise (unusable(name, error) if name in self.worker.names else missing(name)) from None
        return common_format(found)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        tokenizer = self.tokenizer
        most = len(tokenizer)
        if tokens and max(tokens) >= most:
            raise UsageError("no such token", where="tokens", got=str(max(tokens)), expected=f"below {most:,}")
        return await self._aside(lambda: tokenizer.decode(tokens))

    async def _aside(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.texts, function)

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        assert self.worker.engine
        return min(self.worker.engine.context, self.worker.engine.scheduler.limits.cache)

    def room(self, prompt: int) -> int:
        """Tokens that may follow a prompt of so many. Raises `Refusal` if there is no room for one."""
        if not 0 < prompt < self.context:
            raise too_long(f"{prompt:,}", self.context)
        return self.context - prompt

    # Limits ----------------------------------------------------------------------------------------------------

    async def until_gone(self, request: HttpRequest, work: Awaitable[Result]) -> Result:
        """Do something for a client who may leave meanwhile, or wait in vain.

        Raises: Gone; Refusal when it takes too long; what the work raises.
        """
        doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({doing, leaving}, timeout=self.bounds.answering, return_when="FIRST_COMPLETED")
            if doing.done():
                return doing.result()
            if leaving.done():
                raise Gone
            raise Refusal(504, "The answer was not ready in time.", "timeout")
        finally:
            leaving.cancel()
            if not doing.done():
                doing.cancel()
                await asyncio.wait({doing})

    def inside(self, path: str) -> tuple[Path, Folder]:
        """The folder of an adapter and which of the server's own it lies in. Raises `Refusal`: the same for others."""
        shelves = [one for one in (self.folder, self.vectors and self.vectors.folder) if one]
        found = [(place, shelf) for shelf in shelves if (place := shelf.inside(path))]
        if len({place for place, _ in found}) > 1:
            message = "Both bases have an adapter there; give the whole path."
            raise Refusal(400, message, "two_choices", param="lora_path")
        if not found:
            message = "No adapter there, inside the server's folder of adapters."
            raise Refusal(400, message, "no_adapter", param="lora_path")
        return found[0]


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def digests_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """What /v1/models tells of an adapter besides OpenAI's fields."""
    return {name: described[name] for name in ("digest", "rank", "method", "state", "requests")} | {
        "bytes": described["size"]
    }
