"""The bases behind the API, each with its adapters: one that completes texts, and one that makes vectors of them."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gossamer.errors import ArtefactError, DownloadError, GossamerError, NonFiniteError, UsageError
from gossamer.serving.api.faults import Refusal, missing, unusable
from gossamer.serving.api.keys import Tenant
from gossamer.serving.api.prompts import rendered, too_long, within
from gossamer.serving.api.requests import ChatMessage, TemplateOptions, WeightedAdapter
from gossamer.serving.api.responses import ModelCard
from gossamer.serving.api.worker import Worker
from gossamer.serving.chat_format import ChatFormat, common_format
from gossamer.serving.embedding import Embedder, Embeddings
from gossamer.serving.engine import Engine
from gossamer.serving.folder import Folder
from gossamer.serving.hub import Hub

Value = TypeVar("Value")

WAITING = 64
"""Requests that may wait for the one thread of vectors."""
FETCHES = 64
"""Ids of the hub that may be under way, or refused a moment ago."""
MEMORY = 60.0
"""Seconds for which a refusal is remembered: the hub is not asked for the same again and again."""


class Backend(ABC):
    """A base and its adapters.

    Attributes:
        name: what clients call the base.
        folder: that its adapters come from; without one, none can be loaded.
    """

    def __init__(self, name: str, folder: Folder | None = None) -> None:
        self.name, self.created, self.folder = name, int(time.time()), folder
        self.thread = ThreadPoolExecutor(1, "texts")  # neither a tokenizer nor an embedder is for several at a time

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Of the adapters that are known."""

    @abstractmethod
    async def register(self, name: str, folder: Path) -> str:
        """Let a name mean the adapter in a folder; gives its digest. Raises what is wrong with it."""

    @abstractmethod
    async def unregister(self, name: str) -> None:
        """Forget a name."""

    @abstractmethod
    async def cards(self, tenant: Tenant) -> list[ModelCard]:
        """The base, and those of its adapters that can be used and that a tenant may use."""

    @abstractmethod
    async def adapter_card(self, name: str) -> ModelCard:
        """A known adapter. Raises `Refusal`."""

    @abstractmethod
    def close(self) -> None:
        """Begin nothing more."""

    async def aside(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """What a function gives in the base's own thread for texts."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    def fault_of(self, name: str) -> GossamerError | None:
        """Why what a name stands for could not be used, if so."""
        return None

    def knows(self, model: str) -> bool:
        """Whether a client's word for a model means the base or one of its adapters."""
        return model == self.name or model.removeprefix(self.name + ":") in self.names

    def wanted(self, model: str, mix: Sequence[WeightedAdapter] | None = None) -> dict[str, float]:
        """Adapter -> weight that a request asks for, known or not. Raises `Refusal`."""
        if model != self.name:
            if mix is not None:
                raise Refusal(400, f"A mix goes with the base's name, {self.name!r}.", "two_choices", param="lora")
            return {model.removeprefix(self.name + ":"): 1.0}
        found = {one.id: one.scale for one in mix or ()}
        if len(found) < len(mix or ()):
            raise Refusal(400, "An adapter stands twice in the mix.", "twice", param="lora")
        return found

    def resolve(self, tenant: Tenant, model: str, mix: Sequence[WeightedAdapter] | None = None) -> dict[str, float]:
        """The same, if all are known. An unknown one and one of another tenant are the same `Refusal`."""
        found = self.wanted(model, mix)
        for name in found:
            if not tenant.may(name) or name not in self.names:
                if tenant.may(name) and (fault := self.fault_of(name)):
                    raise unusable(name, fault)
                raise missing(name if model == self.name else model)
        return found

    async def find(self, tenant: Tenant, model: str) -> ModelCard:
        """What a client's word for a model means. Raises `Refusal`."""
        name = next(iter(self.resolve(tenant, model)), None)
        return self.card(self.name) if name is None else await self.adapter_card(name)

    def card(self, name: str, digest: str | None = None, **more: Any) -> ModelCard:
        """The base under its own name, or an adapter with its digest."""
        parent, root = (None, name) if name == self.name else (self.name, digest)
        made = {"created": self.created, "owned_by": "gossamer"}
        return ModelCard(id=name, object="model", root=root, parent=parent, **made, **more)


class Fetching:
    """Brings adapters from the hub into an engine's store; `revisions` are the commits that their names stand for."""

    def __init__(self, hub: Hub, worker: Worker) -> None:
        self.hub, self.worker = hub, worker
        self.threads = ThreadPoolExecutor(2, "hub")  # not the store's: other adapters do not wait for the network
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.revisions: dict[str, str] = {}

    def close(self) -> None:
        """Fetch nothing more."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, name: str) -> None:
        """Make an allowed id known to the store, and go on if the client leaves. Raises `Refusal`."""
        if name not in self.tasks:
            if len(self.tasks) >= FETCHES:
                raise Refusal(429, "Too many adapters are being fetched.", "queue_full", after=5)
            self.tasks[name] = task = asyncio.ensure_future(self._fetch(name))
            task.add_done_callback(lambda done: self._forget(name, done))
        await asyncio.shield(self.tasks[name])

    async def _fetch(self, name: str) -> None:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.threads, self.hub.fetch, name)
            if found is None:
                raise missing(name)
            await self.worker.register(name, found.folder)
        except DownloadError:
            raise Refusal(503, "The hub does not answer.", "hub_unreachable", after=int(MEMORY)) from None
        except (ArtefactError, NonFiniteError, UsageError) as error:
            raise unusable(name, error) from None
        self.revisions[name] = found.revision

    def _forget(self, name: str, done: asyncio.Task[None]) -> None:
        failed = not done.cancelled() and done.exception()
        done.get_loop().call_later(MEMORY if failed else 0, self.tasks.pop, name, None)


class CompletionBackend(Backend):
    """The base that completes texts.

    Args:
        worker: has its engine.
        folder: where adapters that are loaded while serving must lie.
        hub: what may be fetched from there.
        other: another base, whose adapters are not this one's.
    """

    def __init__(
        self, name: str, worker: Worker, folder: Folder | None, hub: Hub | None = None, other: Backend | None = None
    ) -> None:
        super().__init__(name, folder)
        self.worker, self.other = worker, other
        self.fetching = Fetching(hub, worker) if hub else None
        self.forgotten: set[str] = set()  # names that were unloaded, whatever their subfolders hold

    @property
    def names(self) -> Collection[str]:
        return self.worker.names

    @property
    def engine(self) -> Engine:
        """The worker's. Raises `Refusal` where there is none yet."""
        return self.worker.present

    def fault_of(self, name: str) -> GossamerError | None:
        return self.worker.engine and self.worker.engine.store.fault_of(name)

    async def register(self, name: str, folder: Path) -> str:
        digest = await self.worker.register(name, folder)
        self.forgotten.discard(name)
        return digest

    async def unregister(self, name: str) -> None:
        await self.worker.call(lambda engine: engine.store.unregister(name), renames=True)
        if self.fetching:
            self.fetching.revisions.pop(name, None)
        self.forgotten.add(name)

    async def cards(self, tenant: Tenant) -> list[ModelCard]:
        def look(engine: Engine) -> list[ModelCard]:
            return [self._card(engine, name) for name in engine.store.usable() if tenant.may(name)]

        return [self.card(self.name), *await self.worker.call(look)]

    async def adapter_card(self, name: str) -> ModelCard:
        def look(engine: Engine) -> ModelCard:
            if fault := engine.store.fault_of(name):
                raise unusable(name, fault)
            if name not in engine.store.names():
                raise missing(name)
            return self._card(engine, name)

        return await self.worker.call(look)

    def _card(self, engine: Engine, name: str) -> ModelCard:
        about = engine.store.describe(name)
        state = {part: about[part] for part in ("digest", "rank", "method", "state", "requests")}
        state["bytes"] = about["size"]
        if self.fetching and (revision := self.fetching.revisions.get(name)):
            state["revision"] = revision
        return self.card(name, about["digest"], gossamer=state)

    async def discover(self, tenant: Tenant, model: str, mix: Sequence[WeightedAdapter] | None = None) -> None:
        """Make known what a request asks for that came later: subfolders, or ids of the hub. Raises `Refusal`."""
        wanted = self.wanted(model, mix).keys()
        for name in sorted(wanted - set(self.names)):
            if tenant.may(name) and name not in self.forgotten and not (self.other and self.other.knows(name)):
                await self._notice(name)
        unknown = sorted(wanted - set(self.names))
        if self.fetching and all(tenant.may(name) & self.fetching.hub.allows(name) for name in unknown):
            for name in unknown:
                await self.fetching.fetch(name)

    async def _notice(self, name: str) -> None:
        """Make a name known whose subfolder came after the start."""

        def offer(engine: Engine) -> None:
            if found and name not in engine.store.names():
                engine.store.offer(name, found)

        if found := self.folder and await asyncio.to_thread(self.folder.named, name):
            await self.worker.call(offer, renames=True)

    def close(self) -> None:
        self.thread.shutdown(wait=False)
        if self.fetching:
            self.fetching.close()

    # Texts -----------------------------------------------------------------------------------------------------

    async def encode(self, text: str, special: bool = True, *, bounded: bool = True) -> tuple[int, ...]:
        """Token ids of a text, with what the tokenizer puts around texts if `special`. Raises as `within`."""
        tokenizer, context = self.engine.tokenizer, self.context if bounded else None
        return await self.aside(within, tokenizer, text, special, context)

    async def encode_chat(
        self, messages: Sequence[ChatMessage], how: TemplateOptions, adapters: Iterable[str], *, bounded: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a conversation that the assistant shall go on with, as its adapters' own template writes it.

        Raises: UsageError; Refusal.
        """
        tokenizer = self.engine.tokenizer
        text = await self.aside(lambda: rendered(tokenizer, messages, how, self._chat_format(adapters)))
        return await self.encode(text, False, bounded=bounded)

    def _chat_format(self, adapters: Iterable[str]) -> ChatFormat:
        """How their chats are written. Raises `Refusal`; UnsupportedError for a mix of several templates."""
        store, found = self.engine.store, []
        for name in adapters:
            try:
                found.append(store.chat_format_of(name))
            except GossamerError as error:
                raise (unusable(name, error) if name in self.names else missing(name)) from None
        return common_format(found)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids. Raises `UsageError` for what is none."""
        tokenizer = self.engine.tokenizer
        if tokens and max(tokens) >= len(tokenizer):
            expected = f"below {len(tokenizer):,}"
            raise UsageError("no such token", where="tokens", got=str(max(tokens)), expected=expected)
        return await self.aside(tokenizer.decode, tokens)

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.engine.context, self.engine.scheduler.limits.cache)

    def room(self, prompt: int) -> int:
        """Tokens that may follow a prompt of so many. Raises `Refusal` if there is no room for one."""
        if not 0 < prompt < self.context:
            raise too_long(f"{prompt:,}", self.context)
        return self.context - prompt


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
        self.folder = self.embedder.folder

    @property
    def names(self) -> Mapping[str, str]:
        return self.embedder.digests if self.embedder else {}

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
