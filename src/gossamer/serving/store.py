"""Adapters by name: read when first asked for, kept while there is room, and the value that a name began with.

An adapter is made ready for what uses it by an `AdapterTarget`: a decoder whose rows each have one, or a model that it
stands on. A request holds the version of a name that it began with: giving the name another meaning is for later
requests and leaves the others as they are.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from gossamer.adapter import Adapter
from gossamer.attachment import base_fingerprint
from gossamer.errors import AdapterFileError, GossamerError, UsageError, nearest
from gossamer.files.places import glance
from gossamer.kernels.routing import Stack
from gossamer.serving.chat_format import PLAIN, ChatFormat, ChatFormats
from gossamer.serving.folder import check_base
from gossamer.serving.originals import Original, Originals

AdapterSource = Adapter | Path | Callable[[], Adapter]


class Placed(NamedTuple):
    """What a target made of an adapter.

    Attributes:
        stacks: number of the decoder's site -> what it makes of the maps there; absent where it has nothing.
        is_sum: whether it only adds low-rank terms, so that it can have a weight and be mixed with others.
        rank: the largest of its ranks; 0 without factors. size: bytes in memory.
    """

    stacks: Mapping[int, Stack] = {}
    is_sum: bool = False
    rank: int = 0
    size: int = 0


class AdapterTarget(Protocol):
    """What adapters are made ready for."""

    def place(self, name: str, number: int, adapter: Adapter) -> Placed:
        """Make an adapter ready, under a number that no other has. Raises what it cannot be used for."""
        ...

    def remove(self, number: int) -> None:
        """Take away what `place` made."""
        ...


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        number: no other adapter's, nor another version's.
        chat_format: how its chats are written.
        original: its files as they were when it was first read, if it came from any.
    """

    name: str
    source: AdapterSource
    number: int
    digest: str
    method: str
    placed: Placed
    chat_format: ChatFormat = PLAIN
    original: Original | None = field(default=None, repr=False)


@dataclass(eq=False)
class AdapterVersion:
    """What a name means until it is given another meaning.

    Attributes:
        holders: requests that wait for it or use it.
        requests: how many have asked for it. loads: how often it was read. last: what is known since, without tensors.
        fault: why it could not be used when it was last read.
    """

    name: str
    source: AdapterSource
    future: Future[LoadedAdapter] | None = None
    holders: int = 0
    requests: int = 0
    loads: int = 0
    last: LoadedAdapter | None = field(default=None, repr=False)
    fault: GossamerError | None = field(default=None, repr=False)
    chat_format: ChatFormat | None = None

    @property
    def loaded(self) -> LoadedAdapter | None:
        """The adapter, if it is in memory."""
        done = self.future is not None and self.future.done() and not self.future.exception()
        return self.future.result() if done and self.future else None

    def learn(self, loaded: LoadedAdapter) -> None:
        """Note what is known of the adapter, without its tensors."""
        self.last, self.fault = replace(loaded, placed=loaded.placed._replace(stacks={})), None


class AdapterStore:
    """Names and what they mean.

    Args:
        model: the base that adapters are for. tokenizer: its own, which adapters' own are held against.
        target: what they are made ready for.
        memory: bytes of adapters that may be in memory. What running requests use is kept beyond it, but nothing more
            is read then.

    Attributes:
        reader: the thread that reads adapters beside an engine.
        unfit: names that are not known, as what they stand for cannot be used, and why.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, target: AdapterTarget, memory: float = 2**30) -> None:
        self.target, self.memory = target, memory
        self.versions: dict[str, AdapterVersion] = {}
        self.resident: dict[AdapterVersion, None] = {}  # in memory or being read, what was asked for longest ago first
        self.fingerprint = base_fingerprint(model)
        self.unfit: dict[str, GossamerError] = {}
        self.chat_formats, self.originals = ChatFormats(tokenizer), Originals()
        self.numbers = itertools.count()
        self.reader = _reader()

    # Names -----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All that are known, sorted."""
        return sorted(self.versions)

    def usable(self) -> list[str]:
        """Those of them that could be used when they were last read, or were not read yet, sorted."""
        return sorted(name for name, version in self.versions.items() if not version.fault)

    def fault_of(self, name: str) -> GossamerError | None:
        """Why what a name stands for could not be used, if so."""
        return version.fault if (version := self.versions.get(name)) else self.unfit.get(name)

    def chat_format_of(self, name: str) -> ChatFormat:
        """How its chats are written. Raises what `ChatFormats.of` raises, and `UsageError` for an unknown name."""
        version = self._known(name)
        if version.last:
            return version.last.chat_format
        if version.chat_format is None:
            version.chat_format = self._chat_format(version.source)
        return version.chat_format

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of an adapter: digest, rank, method and size only once it was read."""
        version = self._known(name)
        state = "disk" if version.loaded is None else "in use" if version.holders else "memory"
        about: dict[str, Any] = {"digest": None, "rank": None, "method": None, "size": None}
        if last := version.last or version.loaded:
            placed = last.placed
            about = {"digest": last.digest, "rank": placed.rank, "method": last.method, "size": placed.size}
        return {"name": name} | about | {"state": state, "requests": version.requests, "loads": version.loads}

    def register(self, name: str, source: AdapterSource) -> None:
        """Make a name known, or mean something else from now on; a value is made ready at once, a folder when used.

        Raises: what making it ready raises; the name then means what it meant before.
        """
        if isinstance(source, Adapter):
            self.put(self.prepare(name, source))
        else:
            self._mean(AdapterVersion(name, source))

    def offer(self, name: str, folder: Path) -> None:
        """Make a folder's name known if it can be used, as far as is seen without its tensors, else `unfit`."""
        try:
            check_base(name, glance(folder), self.fingerprint)
        except GossamerError as error:
            self.unfit[name] = error
        else:
            self.register(name, folder)

    def prepare(self, name: str, source: AdapterSource, known: LoadedAdapter | None = None) -> LoadedAdapter:
        """Read and check an adapter for a name; changes no name. `reader` is the thread to do it beside an engine.

        Args:
            known: what the name has meant since it was first read, and goes on to mean.

        Raises: AdapterFileError, also where the files are not those of `known` any more; BaseMismatchError;
            TargetError; UnsupportedError for what the target cannot use; NonFiniteError.
        """
        if known:
            return self._placed(name, source, _again(name, source, known), known.chat_format, known.original)
        may_be_evicted = math.isfinite(self.memory)
        original = self.originals.of(source) if isinstance(source, Path) and may_be_evicted else None
        try:
            chat_format = self._chat_format(source)
            return self._placed(name, source, _read(source), chat_format, original)
        except BaseException:
            self.originals.forget(original)
            raise

    def _placed(
        self, name: str, source: AdapterSource, adapter: Adapter, chat_format: ChatFormat, original: Original | None
    ) -> LoadedAdapter:
        check_base(name, adapter.base, self.fingerprint)
        number = next(self.numbers)
        placed = self.target.place(name, number, adapter)
        return LoadedAdapter(name, source, number, adapter.digest, adapter.spec.name, placed, chat_format, original)

    def _chat_format(self, source: AdapterSource) -> ChatFormat:
        return self.chat_formats.of(source) if isinstance(source, Path) else PLAIN

    def put(self, loaded: LoadedAdapter) -> None:
        """Let the adapter's name mean it from now on."""
        future: Future[LoadedAdapter] = Future()
        future.set_result(loaded)
        version = AdapterVersion(loaded.name, loaded.source, future, loads=1)
        version.learn(loaded)
        self._mean(version)

    def unregister(self, name: str) -> None:
        """Forget a name; requests that use the adapter go on. Raises `UsageError` for one that is not known."""
        version = self._known(name)
        del self.versions[name]
        if not version.holders:
            self._forget(version)

    def close(self) -> None:
        """Read nothing more."""
        self.reader.shutdown(cancel_futures=True)
        self.originals.forget(*self.originals.kept)

    def _mean(self, version: AdapterVersion) -> None:
        if version.name in self.versions:
            self.unregister(version.name)
        self.versions[version.name] = version
        self.unfit.pop(version.name, None)
        if version.future is not None:
            self.resident[version] = None
        self._make_room()

    def _forget(self, version: AdapterVersion) -> None:
        self._evict(version)
        self.originals.forget(version.last.original if version.last else None)

    def _known(self, name: str) -> AdapterVersion:
        if name not in self.versions:
            if name in self.unfit:
                raise self.unfit[name]
            hint = nearest(name, self.versions) or "register it first"
            raise UsageError("no adapter of this name", got=name, hint=hint)
        return self.versions[name]

    # Use -------------------------------------------------------------------------------------------------------

    def hold(self, names: Iterable[str]) -> tuple[AdapterVersion, ...]:
        """What the names mean now, until it is let go. Raises `UsageError` for an unknown one."""
        found = tuple(self._known(name) for name in names)
        for version in found:
            version.holders += 1
            version.requests += 1
            if version in self.resident:
                self.resident[version] = self.resident.pop(version)  # to the end
        return found

    def let_go(self, held: Iterable[AdapterVersion]) -> None:
        """End the use of what `hold` gave."""
        for version in held:
            version.holders -= 1
            if not version.holders and self.versions.get(version.name) is not version:
                self._forget(version)  # replaced meanwhile
        self._make_room()

    def ready(self, held: Iterable[AdapterVersion], at_once: bool = False) -> bool:
        """Whether all are in memory, or failed to get there; else they are being read if there is room (or at once)."""
        for version in held:
            if version.future is None and (self._make_room() or at_once):
                version.future = self.reader.submit(self.prepare, version.name, version.source, version.last)
                version.loads += 1
                self.resident[version] = None
        return all(version.future is not None and version.future.done() for version in held)

    def take(self, version: AdapterVersion) -> LoadedAdapter:
        """The adapter of a version that is ready; raises what reading it raised, and lets it be read again."""
        assert version.future is not None
        try:
            found = version.future.result()
        except Exception as error:
            version.fault = error if isinstance(error, GossamerError) else None
            version.future = None
            self.resident.pop(version, None)
            raise
        version.learn(found)
        return found

    def wait(self, seconds: float) -> None:
        """Until something that is being read is there."""
        reading = [one.future for one in self.resident if one.future and not one.future.done()]
        wait(reading, timeout=seconds, return_when="FIRST_COMPLETED")

    @property
    def bytes(self) -> int:
        """Of the adapters in memory."""
        return sum(one.loaded.placed.size for one in self.resident if one.loaded)

    def _make_room(self) -> bool:
        """Evict what was asked for longest ago and nobody holds; whether there is room for one more."""
        total = self.bytes
        for version in [*self.resident]:
            if total <= self.memory:
                break
            if version.loaded and not version.holders:
                total -= version.loaded.placed.size
                self._evict(version)
        return total < self.memory or not any(one.loaded and one.holders for one in self.resident)

    def _evict(self, version: AdapterVersion) -> None:
        if version.loaded:
            self.target.remove(version.loaded.number)
        version.future = None
        self.resident.pop(version, None)


def _read(source: AdapterSource) -> Adapter:
    if isinstance(source, Adapter):
        return source
    return Adapter.load(source) if isinstance(source, Path) else source()


def _again(name: str, source: AdapterSource, known: LoadedAdapter) -> Adapter:
    """The value that was known, from where it came or from the files that lay there then."""
    for read in (lambda: _read(source), *([known.original.read] if known.original else [])):
        try:
            found = read()
        except (GossamerError, OSError):
            continue
        if found.digest == known.digest:
            return found
    raise AdapterFileError(
        "the adapter's files were changed since it was first read",
        where=name,
        expected=known.digest,
        hint="load it again, in place",
    )


def _reader() -> ThreadPoolExecutor:
    """A thread that reads adapters and computes with one core.

    A second thread with workers of its own makes OpenMP put its workers to sleep between products, and a step of the
    engine take twice as long, from then on.
    """
    before = torch.get_num_threads()
    reader = ThreadPoolExecutor(1, "adapters")
    reader.submit(torch.set_num_threads, 1).result()
    reader.submit(torch.get_num_threads).result()  # which makes it this thread's own,
    torch.set_num_threads(before)  # as others begin with what was set last
    return reader
