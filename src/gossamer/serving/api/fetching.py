"""Adapters that requests name by their id on the hub: fetched once, then known like all others."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from gossamer.errors import ArtefactError, DownloadError, NonFiniteError, UsageError
from gossamer.serving.api.faults import Refusal, missing, unusable
from gossamer.serving.api.worker import Worker
from gossamer.serving.hub import Hub

WAITING = 64
"""Ids that may be under way, or refused a moment ago, at a time."""
MEMORY = 60.0
"""Seconds for which a refusal is remembered: the hub is not asked for the same again and again."""


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
            if len(self.tasks) >= WAITING:
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
