"""Adapters for the engine: known by name, read by another thread when first asked for, kept while there is room.

In memory an adapter is what `kernels.routed` wants of it at each of the decoder's sites. A request holds the version of
a name that it began with: replacing the name gives later requests the new one and leaves the others as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.adapter import Adapter
from gossamer.attachment import base_fingerprint
from gossamer.attachment.frozen import Frozen
from gossamer.attachment.kinds import shape_of
from gossamer.attachment.layers import stored_layers
from gossamer.attachment.walk import differing
from gossamer.errors import (
    AdapterFileError,
    BaseMismatchError,
    GossamerError,
    NonFiniteError,
    UnsupportedError,
    UsageError,
    nearest,
)
from gossamer.files.places import glance
from gossamer.kernels.routing import LinearChange, Stack
from gossamer.methods import TargetedMethod
from gossamer.running.steps import Decoder
from gossamer.serving.chat_format import PLAIN, ChatFormat, ChatFormats
from gossamer.serving.originals import Original, Originals

Source = Adapter | Path | Callable[[], Adapter]


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter in memory.

    Attributes:
        stacks: number of the decoder's site -> what it makes of the maps there; absent where it has nothing.
        number: no other adapter's, nor another version's.
        is_sum: whether it only adds low-rank terms, so that it can have a weight and be mixed with others.
        rank: the largest of its ranks; 0 without factors.
        chat_format: how its chats are written.
        original: its files as they were when it was first read, if it came from any.
    """

    name: str
    source: Source
    digest: str
    method: str
    stacks: Mapping[int, Stack]
    is_sum: bool
    rank: int
    size: int
    chat_format: ChatFormat = PLAIN
    original: Original | None = field(default=None, repr=False)
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def facts(self) -> Loaded:
        """What is known of it, without its tensors."""
        return replace(self, stacks={})


@dataclass(eq=False)
class Version:
    """What a name means until it is given another meaning.

    Attributes:
        holders: requests that wait for it or use it.
        requests: how many have asked for it. loads: how often it was read. last: what is known since, without tensors.
        fault: why it could not be used when it was last read.
    """

    name: str
    source: Source
    future: Future[Loaded] | None = None
    holders: int = 0
    requests: int = 0
    loads: int = 0
    last: Loaded | None = field(default=None, repr=False)
    fault: GossamerError | None = field(default=None, repr=False)
    chat_format: ChatFormat | None = None

    @property
    def loaded(self) -> Loaded | None:
        """The adapter, if it is in memory."""
        done = self.future is not None and self.future.done() and not self.future.exception()
        return self.future.result() if done and self.future else None


class Store:
    """Names and what they mean.

    Args:
        model, decoder: what adapters are for.
        memory: bytes of adapters that may be in memory. What running requests use is kept beyond it, but nothing more
            is read then.
        tokenizer: the base's, which adapters' own are held against.

    Attributes:
        unfit: names that are not known, as what they stand for cannot be used, and why.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, memory: int = 2**30, tokenizer: Any = None) -> None:
        self.model, self.decoder, self.memory = model, decoder, memory
        self.places = {path: (site, place) for site, one in enumerate(decoder.sites)
                       for place, path in enumerate(one.paths)}  # fmt: skip
        self.versions: dict[str, Version] = {}
        self.resident: dict[Version, None] = {}  # in memory or being read, what was asked for longest ago first
        self.fingerprint = base_fingerprint(model)
        self.unfit: dict[str, GossamerError] = {}
        self.chat_formats, self.originals = ChatFormats(tokenizer), Originals()
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
            version.chat_format = self.chat_formats.of(version.source) if isinstance(version.source, Path) else PLAIN
        return version.chat_format

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of an adapter: digest, rank, method and size only once it was read."""
        version = self._known(name)
        last = version.loaded or version.last
        state = "disk" if version.loaded is None else "in use" if version.holders else "memory"
        about = {"digest": last.digest, "rank": last.rank, "method": last.method, "size": last.size} if last else {}
        empty = {"digest": None, "rank": None, "method": None, "size": None}
        counts = {"state": state, "requests": version.requests, "loads": version.loads}
        return {"name": name} | empty | about | counts

    def register(self, name: str, source: Source) -> None:
        """Make a name known, or mean something else from now on; a value is made ready at once, a folder when used.

        Raises: what making it ready raises; the name then means what it meant before.
        """
        if isinstance(source, Adapter):
            self.put(self.prepare(name, source))
        else:
            self._mean(Version(name, source))

    def offer(self, name: str, folder: Path) -> None:
        """Make a folder's name known if it can be used, as far as is seen without its tensors, else `unfit`."""
        try:
            made_for = glance(folder)
            if made_for and (other := differing(made_for, self.fingerprint)):
                raise _of_another(name, other)
        except GossamerError as error:
            self.unfit[name] = error
        else:
            self.register(name, folder)

    def prepare(self, name: str, source: Source, known: Loaded | None = None) -> Loaded:
        """Read and check an adapter for a name; changes nothing. `reader` is the thread to do it beside an engine.

        Args:
            known: what the name has meant since it was first read, and goes on to mean.

        Raises: AdapterFileError, also where the files are not those of `known` any more; BaseMismatchError;
            TargetError; UnsupportedError for what rows cannot have each their own of; NonFiniteError.
        """
        if known:
            return self._ready(name, source, _again(name, source, known), known.chat_format, known.original)
        original = self.originals.of(source) if isinstance(source, Path) else None
        try:
            chat_format = self.chat_formats.of(source) if isinstance(source, Path) else PLAIN
            return self._ready(name, source, _read(source), chat_format, original)
        except BaseException:
            self.originals.forget(original)
            raise

    def _ready(
        self, name: str, source: Source, adapter: Adapter, chat_format: ChatFormat, original: Original | None
    ) -> Loaded:
        """An adapter as rows of a batch want it."""
        if adapter.base and (other := differing(adapter.base, self.fingerprint)):
            raise _of_another(name, other)
        shares = self._shares(name, adapter)
        stacks = {site: self._stack(site, found) for site, found in shares.items()}
        ranks = [pair.rank for stack in stacks.values() for pair in stack.pairs]
        is_sum = not any(stack.rest for stack in stacks.values())
        size = sum(stack.nbytes for stack in stacks.values())
        about = (adapter.digest, adapter.spec.name, stacks, is_sum, max(ranks, default=0), size)
        return Loaded(name, source, *about, chat_format, original)

    def put(self, loaded: Loaded) -> None:
        """Let the adapter's name mean it from now on."""
        future: Future[Loaded] = Future()
        future.set_result(loaded)
        self._mean(Version(loaded.name, loaded.source, future, loads=1, last=loaded.facts))

    def unregister(self, name: str) -> None:
        """Forget a name; requests that use the adapter go on. Raises `UsageError` for one that is not known."""
        version = self._known(name)
        del self.versions[name]
        if not version.holders:
            self._forget(version)

    def close(self) -> None:
        """Read nothing more."""
        self.reader.shutdown(cancel_futures=True)
        self.originals.close()

    def _mean(self, version: Version) -> None:
        if version.name in self.versions:
            self.unregister(version.name)
        self.versions[version.name] = version
        self.unfit.pop(version.name, None)
        if version.future is not None:
            self.resident[version] = None
        self._make_room()

    def _forget(self, version: Version) -> None:
        self.resident.pop(version, None)
        self.originals.forget(version.last.original if version.last else None)

    def _known(self, name: str) -> Version:
        if name not in self.versions:
            if name in self.unfit:
                raise self.unfit[name]
            hint = nearest(name, self.versions) or "register it first"
            raise UsageError("no adapter of this name", got=name, hint=hint)
        return self.versions[name]

    # Use -------------------------------------------------------------------------------------------------------

    def hold(self, names: Sequence[str]) -> list[Version]:
        """What the names mean now, until it is let go. Raises `UsageError` for an unknown one."""
        found = [self._known(name) for name in names]
        for version in found:
            version.holders += 1
            version.requests += 1
            if version in self.resident:
                self.resident[version] = self.resident.pop(version)  # to the end
        return found

    def let_go(self, held: Sequence[Version]) -> None:
        """End the use of what `hold` gave."""
        for version in held:
            version.holders -= 1
            if not version.holders and self.versions.get(version.name) is not version:
                self._forget(version)  # replaced meanwhile
        self._make_room()

    def ready(self, held: Sequence[Version], at_once: bool = False) -> bool:
        """Whether all are in memory, or failed to get there; else they are being read if there is room (or at once)."""
        for version in held:
            if version.future is None and (self._make_room() or at_once):
                version.future = self.reader.submit(self.prepare, version.name, version.source, version.last)
                version.loads += 1
                self.resident[version] = None
        return all(version.future is not None and version.future.done() for version in held)

    def take(self, version: Version) -> Loaded:
        """The adapter of a version that is ready; raises what reading it raised, and lets it be read again."""
        assert version.future is not None
        try:
            found = version.future.result()
        except Exception as error:
            version.fault = error if isinstance(error, GossamerError) else None
            version.future = None
            self.resident.pop(version, None)
            raise
        version.last, version.fault = found.facts, None
        return found

    def wait(self, seconds: float) -> None:
        """Until something that is being read is there."""
        reading = [one.future for one in self.resident if one.future and not one.future.done()]
        wait(reading, timeout=seconds, return_when="FIRST_COMPLETED")

    @property
    def bytes(self) -> int:
        """Of the adapters in memory."""
        return sum(one.loaded.size for one in self.resident if one.loaded)

    def _make_room(self) -> bool:
        """Forget what was asked for longest ago and nobody holds; whether there is room for one more."""
        total = self.bytes
        for version in [*self.resident]:
            if total <= self.memory:
                break
            if version.loaded and not version.holders:
                total -= version.loaded.size
                version.future = None
                del self.resident[version]
        return total < self.memory or not any(one.loaded and one.holders for one in self.resident)

    # Reading ---------------------------------------------------------------------------------------------------

    def _shares(self, name: str, adapter: Adapter) -> dict[int, dict[int, LinearChange]]:
        """Site -> place among its maps -> the adapter's share."""
        if not isinstance(adapter.spec, TargetedMethod):
            raise UnsupportedError("no row of a batch can have its own", where=name, got=adapter.spec.name)
        _, layers = stored_layers(self.model, adapter)
        found: dict[int, dict[int, LinearChange]] = {}
        for path, (shape, layer) in layers.items():
            site, place = self.places.get(path, (-1, 0))
            module = self.decoder.sites[site].modules[place]
            share = layer.linear_change(Frozen(shape, module)) if site >= 0 else None
            if share is None or (share.given is not None and len(self.decoder.sites[site].paths) > 1):
                raise UnsupportedError(
                    "an adapter has something that rows of a batch cannot each have their own of",
                    where=f"{name}: {path}",
                    got=f"{adapter.spec.name} at {shape.class_name}",
                    hint="merge it, or serve it as the base",
                )
            if not all(bool(part.isfinite().all()) for part in share.tensors()):
                raise NonFiniteError("an adapter holds NaN or infinity", where=f"{name}: {path}")
            found.setdefault(site, {})[place] = share
        return found

    def _stack(self, site: int, shares: Mapping[int, LinearChange]) -> Stack:
        maps = [
            Frozen(shape_of(path, module), module).shape for path, module in zip(*self.decoder.sites[site], strict=True)
        ]
        like = self.decoder.like.new_zeros(0, maps[0].in_features)
        return Stack.of([shares.get(place) for place in range(len(maps))], [one.out_features for one in maps], like)


def _of_another(name: str, parts: Sequence[str]) -> BaseMismatchError:
    return BaseMismatchError(f"this adapter was made for another base ({', '.join(parts)} differ)", where=name)


def _read(source: Source) -> Adapter:
    if isinstance(source, Adapter):
        return source
    return Adapter.load(source) if isinstance(source, Path) else source()


def _again(name: str, source: Source, known: Loaded) -> Adapter:
    """The value that was known, from where it came or from the files that lay there then."""
    fault = AdapterFileError(
        "the adapter's files were changed since it was first read",
        where=name,
        expected=known.digest,
        hint="load it again, in place",
    )
    for read in (lambda: _read(source), *([known.original.read] if known.original else [])):
        try:
            found = read()
        except (GossamerError, OSError):
            continue
        if found.digest == known.digest:
            return found
    raise fault


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
