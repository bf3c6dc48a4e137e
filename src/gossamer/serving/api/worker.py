"""One thread that owns the engine, and the way to it from an event loop.

Everything that touches the engine is a function that this thread runs between two steps. What a step brought is told
to the event loop in one call, however many requests it was for. The thread sleeps when there is nothing to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from gossamer.errors import GossamerError, NonFiniteError, UsageError
from gossamer.serving.api.faults import Refusal, missing, unexpected, unusable
from gossamer.serving.engine import Engine
from gossamer.serving.sequence import Reply, Sequence

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """What one sequence of a job got since it was last told.

    Attributes:
        index: which sequence of the job.
        reply: what is new. fault: or why there is none.
    """

    index: int
    reply: Reply
    fault: BaseException | None


class Job:
    """Sequences that one client asked for together. Iterating gives their progress until all are done."""

    def __init__(self, worker: Worker, count: int) -> None:
        self.worker, self.open = worker, count
        self.news: asyncio.Queue[Progress] = asyncio.Queue()
        self.sequences: list[Sequence] = []

    async def __aiter__(self) -> AsyncIterator[Progress]:
        while self.open:
            progress = await self.news.get()
            if progress.fault:
                raise progress.fault
            self.open -= progress.reply.finish is not None
            yield progress

    def leave(self) -> None:
        """Nobody waits for it any more: what still runs is cancelled."""
        if self.open:
            self.worker.cancel(self)


@dataclass
class _Watch:
    """Which sequence of which job it is."""

    job: Job
    index: int


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        make: gives the engine; called in that thread, as it may take a while.

    Attributes:
        names: the adapters that are known, as of now. Only the thread changes what it refers to.
        waiting, running: sequences, as of the last step.
        fault: why there is no engine, or none any more.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.make = make
        self.mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.watched: dict[Sequence, _Watch] = {}
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

    async def call(self, function: Callable[[Engine], Result], *, renames: bool = False) -> Result:
        """Run a function with the engine between two steps, and give what it gives or raises.

        Args:
            renames: the function changes which adapters are known.
        """
        if self.engine is None or self.fault:
            raise Refusal(503, "The model is not there.", "not_ready", after=5)
        engine, answer = self.engine, self.loop.create_future()

        def run() -> None:
            try:
                result = function(engine)
            except Exception as error:  # whatever it is, it is the caller's
                self._tell(_set, answer, None, error)
            else:
                if renames:
                    self.names = frozenset(engine.store.names())
                self._tell(_set, answer, result, None)

        self.mail.put(run)
        return await answer

    async def submit(self, sequences: list[Sequence]) -> Job:
        """Let the engine take all of these, or none. Raises what `Engine.submit` raises, and `Refusal`."""
        job = Job(self, len(sequences))
        asking = asyncio.ensure_future(self.call(lambda engine: self._submit(engine, job, sequences)))
        try:
            await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(lambda done: done.cancelled() or done.exception() or job.leave())
            raise
        return job

    def cancel(self, job: Job) -> None:
        """End what of a job still runs."""

        def run() -> None:
            for sequence in job.sequences:
                self.watched.pop(sequence, None)
                if self.engine and not self.fault:
                    self.engine.cancel(sequence)

        self.mail.put(run)

    async def close(self) -> None:
        """End the thread; what still runs is cancelled."""
        self._closing = True
        self.mail.put(lambda: None)
        await asyncio.to_thread(self.thread.join, 10)

    # In the thread ---------------------------------------------------------------------------------------------

    def _submit(self, engine: Engine, job: Job, sequences: list[Sequence]) -> None:
        try:
            for sequence in sequences:
                job.sequences.append(engine.submit(sequence))
        except GossamerError as error:
            for sequence in job.sequences:
                engine.cancel(sequence)
            known = engine.store.names()
            gone = [name for sequence in sequences for name in sequence.adapters if name not in known]
            if gone and (fault := engine.store.fault_of(gone[0])):
                raise unusable(gone[0], fault) from None
            if gone and isinstance(error, UsageError):  # unloaded since the client was let in
                raise missing(gone[0]) from None
            raise
        for index, sequence in enumerate(job.sequences):
            self.watched[sequence] = _Watch(job, index)

    def _run(self) -> None:
        try:
            self.engine = self.make()
            self.names = frozenset(self.engine.store.names())
        except Exception as error:  # the loop's side says it
            self.fault = error
        self._tell(self.loaded.set)
        while not self._closing:
            try:
                self._read_mail()
                if self.engine and self.engine.busy and not self.fault:
                    self._step(self.engine)
            except Exception as error:  # a fault of ours: nobody can tell what state the rows are in
                self.fault = unexpected(error)
                self._fail(self.fault)
        if self.engine:
            self.engine.close()
        self._fail(Refusal(503, "The server was stopped.", "stopped"))

    def _read_mail(self) -> None:
        """Do what came in; wait for something when nobody is there."""
        idle = self.engine is None or self.fault is not None or not self.engine.busy
        with contextlib.suppress(queue.Empty):
            self.mail.get(block=idle)()
            while True:
                self.mail.get_nowait()()

    def _step(self, engine: Engine) -> None:
        through = engine.step()
        self.waiting, self.running = engine.scheduler.waiting, len(engine.scheduler.running)
        news = [(watch.job, self._news(sequence, watch)) for sequence, watch in [*self.watched.items()]]
        self._tell(_deliver, [(job, progress) for job, progress in news if progress])
        if not through and engine.busy:  # adapters are being read
            with contextlib.suppress(queue.Empty):
                self.mail.get(timeout=0.002)()

    def _news(self, sequence: Sequence, watch: _Watch) -> Progress | None:
        news = sequence.news()
        if news is None:
            return None
        if sequence.done:
            del self.watched[sequence]
        return Progress(watch.index, news, _fault(sequence))

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits."""
        told = [(watch.job, Progress(watch.index, Reply(), error)) for watch in self.watched.values()]
        self.watched.clear()
        self._tell(_deliver, told)

    def _tell(self, function: Callable[..., object], *arguments: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)


def _fault(sequence: Sequence) -> BaseException | None:
    """Why a request has no answer; what is an adapter's fault is told as that."""
    fault = sequence.fault
    of = [one.name for one in sequence.held if fault is not None and one.fault is fault]
    if isinstance(fault, NonFiniteError):
        of = of or [loaded.name for loaded, _ in sequence.mix]
    return unusable(", ".join(of), fault) if of and fault else fault


def _set(answer: asyncio.Future, result: object, error: BaseException | None) -> None:
    if answer.cancelled():
        return
    if error:
        answer.set_exception(error)
    else:
        answer.set_result(result)


def _deliver(news: Iterable[tuple[Job, Progress]]) -> None:
    for job, progress in news:
        job.news.put_nowait(progress)
