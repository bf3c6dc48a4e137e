"""One thread that owns the engine, and the way to it from an event loop.

Everything that touches the engine is a function that this thread runs between two steps. What a step brought is handed
to the event loop in one call, however many requests it was for. The thread sleeps when there is nothing to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from gossamer.errors import GossamerError, NonFiniteError, UsageError
from gossamer.serving.api.faults import Refusal, missing, not_ready, unexpected, unusable
from gossamer.serving.engine import Engine
from gossamer.serving.sequence import Reply, Sequence

Value = TypeVar("Value")
Update = tuple[int, Reply]
"""Of which sequence of a group, and what is new of it."""


class SequenceGroup:
    """Sequences that one client asked for together.

    Iterating gives which of them and what is new of it, until all are finished; or raises why one failed.
    """

    def __init__(self, worker: Worker, sequences: list[Sequence]) -> None:
        self.worker, self.sequences, self.open = worker, sequences, len(sequences)
        self.news: asyncio.Queue[tuple[int, Reply | BaseException]] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Update]:
        while self.open:
            index, new = await self.news.get()
            if isinstance(new, BaseException):
                raise new
            self.open -= new.finish is not None
            yield index, new

    def leave(self) -> None:
        """Nobody waits for it any more: what still runs is cancelled."""
        if self.open:
            self.worker.mail.put(lambda: self.worker.cancel(self))


class Worker:
    """Runs an engine in a thread of its own.

    Attributes:
        make: gives the engine; called in that thread, as it may take a while.
        names: the adapters that are known, as of now. Only the thread changes what it refers to.
        waiting, running: sequences, as of the last step.
        watched: sequences whose news are wanted: the group, and the number there.
        fault: why there is no engine, or none any more.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.make = make
        self.mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.watched: dict[Sequence, tuple[SequenceGroup, int]] = {}
        self.names: frozenset[str] = frozenset()
        self.waiting = self.running = 0
        self.fault: BaseException | None = None
        self.loaded = asyncio.Event()
        self.engine: Engine | None = None
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._closing = False

    # For the event loop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; `loaded` is set when the engine is there, or a fault."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests can be served."""
        return self.engine is not None and self.fault is None and not self._closing

    @property
    def present(self) -> Engine:
        """The engine. Raises `Refusal` where there is none yet, or none any more."""
        if self.engine is None or self.fault:
            raise not_ready()
        return self.engine

    async def call(self, function: Callable[[Engine], Value], *, renames: bool = False) -> Value:
        """What a function gives or raises with the engine between two steps; `renames`: it changes which are known."""
        engine, answer = self.present, Future[Value]()
        answer.set_running_or_notify_cancel()  # it is done whether or not the caller still waits

        def run() -> None:
            try:
                result = function(engine)
            except Exception as error:  # whatever it is, it is the caller's
                answer.set_exception(error)
            else:
                if renames:
                    self.names = frozenset(engine.store.names())
                answer.set_result(result)

        self.mail.put(run)
        return await asyncio.wrap_future(answer)

    async def register(self, name: str, folder: Path) -> str:
        """Let a name mean the adapter in a folder, which another thread reads; gives its digest."""
        store = self.present.store
        loaded = await asyncio.wrap_future(store.reader.submit(store.prepare, name, folder))
        await self.call(lambda engine: engine.store.put(loaded), renames=True)
        return loaded.digest

    async def submit(self, sequences: list[Sequence]) -> SequenceGroup:
        """Let the engine take all of these, or none. Raises what `Engine.submit` raises, and `Refusal`."""
        group = SequenceGroup(self, sequences)
        submitting = asyncio.ensure_future(self.call(lambda engine: self._submit(engine, group)))
        try:
            await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(lambda done: done.cancelled() or done.exception() or group.leave())
            raise
        return group

    async def close(self) -> None:
        """End the thread; what still runs is cancelled."""
        self._closing = True
        self.mail.put(lambda: None)
        await asyncio.to_thread(self.thread.join, 10)

    # In the thread ---------------------------------------------------------------------------------------------

    def cancel(self, group: SequenceGroup) -> None:
        """End what of a group still runs."""
        for sequence in group.sequences:
            self.watched.pop(sequence, None)
            if self.engine and not self.fault:
                self.engine.cancel(sequence)

    def _submit(self, engine: Engine, group: SequenceGroup) -> None:
        try:
            for sequence in group.sequences:
                engine.submit(sequence)
        except GossamerError as error:
            self.cancel(group)
            known = engine.store.names()
            gone = [name for one in group.sequences for name in one.adapters if name not in known]
            if gone and (fault := engine.store.fault_of(gone[0])):
                raise unusable(gone[0], fault) from None
            if gone and isinstance(error, UsageError):  # unloaded since the client was let in
                raise missing(gone[0]) from None
            raise
        self.watched |= {sequence: (group, index) for index, sequence in enumerate(group.sequences)}

    def _run(self) -> None:
        try:
            self.engine = self.make()
            self.names = frozenset(self.engine.store.names())
        except Exception as error:  # the loop's side says it
            self.fault = error
        self._send(self.loaded.set)
        while not self._closing:
            try:
                self._read_mail()
                if self.engine and self.engine.busy and not self.fault:
                    self._step(self.engine)
            except Exception as error:  # a fault of ours: what state the rows are in is not known
                self.fault = unexpected(error)
                self._fail(self.fault)
        if self.engine:
            self.engine.close()
        self._fail(Refusal(503, "The server was stopped.", "stopped"))

    def _read_mail(self) -> None:
        """Do what came in; wait for something when no sequence runs."""
        idle = self.engine is None or self.fault is not None or not self.engine.busy
        with contextlib.suppress(queue.Empty):
            self.mail.get(block=idle)()
            while True:
                self.mail.get_nowait()()

    def _step(self, engine: Engine) -> None:
        through = engine.step()
        self.waiting, self.running = engine.scheduler.waiting, len(engine.scheduler.running)
        news = [(*watch, new) for one, watch in self.watched.items() if (new := _news(one))]
        self.watched = {one: watch for one, watch in self.watched.items() if not one.done}
        self._send(_deliver, news)
        if not through and engine.busy:  # adapters are being read
            with contextlib.suppress(queue.Empty):
                self.mail.get(timeout=0.002)()

    def _fail(self, error: BaseException) -> None:
        """Let everybody who waits hear of it."""
        news = [(*watch, error) for watch in self.watched.values()]
        self.watched.clear()
        self._send(_deliver, news)

    def _send(self, function: Callable[..., object], *arguments: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)


def _news(sequence: Sequence) -> Reply | BaseException | None:
    """What is new of a sequence, or why it failed: an adapter's fault as one of the adapter's."""
    if (fault := sequence.fault) is None:
        return sequence.news()
    of = [one.name for one in sequence.held if one.fault is fault]
    if isinstance(fault, NonFiniteError):
        of = of or [loaded.name for loaded, _ in sequence.mix]
    return unusable(", ".join(of), fault) if of else fault


def _deliver(news: Iterable[tuple[SequenceGroup, int, Reply | BaseException]]) -> None:
    for group, index, new in news:
        group.news.put_nowait((index, new))
