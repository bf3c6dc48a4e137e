"""One base, any number of adapters, another one in every row: schedule, run, settle, until nobody waits.

schedule   who takes part in the next step, and with how many tokens (`scheduler`, which knows no tensors)
run        all of them through the model at once; each row with its own adapters (`models.steps`, `kernels.routed`)
settle     draw a token for each that came to its end, finish those that are done, free their rows
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gossamer.adapter import Adapter
from gossamer.attachment import attached
from gossamer.errors import GossamerError, NonFiniteError, ResourceError, StateError, UnsupportedError, UsageError
from gossamer.files.places import adapter_of
from gossamer.models import load_base
from gossamer.models.device import free_bytes, keep_freed_memory
from gossamer.models.language import positions
from gossamer.running.cached import CachedDecoder
from gossamer.running.steps import Chunk, Decoder, StepInput
from gossamer.running.whole_steps import TransformersDecoder, refusal
from gossamer.serving.folder import Folder
from gossamer.serving.guidance import Guide
from gossamer.serving.prefixes import LEAST, Prefixes, common
from gossamer.serving.request import Finish, Reply, Request, Sampling
from gossamer.serving.sampling import Drawn, Sampler
from gossamer.serving.scheduler import Limits, Scheduler
from gossamer.serving.store import Store
from gossamer.serving.terms import BatchTerms
from gossamer.serving.text import Writer
from gossamer.serving.ticket import Ticket
from gossamer.serving.vocabulary import encoded, ends_of, texts, vocabulary_of


class Engine:
    """Serves a base and its adapters on this machine. Used from one thread.

    Args:
        base: what `load_base` takes, or a model and its tokenizer.
        adapters: names -> values or folders; or a folder whose subfolders are adapters, named as they are.
        limits: of a step, of the queue and of the cache.
        memory: bytes of adapters that may be in memory.
        prefixes: bytes of keys and values that are kept of what was read, for requests that begin alike.
        prepack: copy the weights into the layout that products on this CPU read best, which makes a step up to twice
            as fast; by default on CPUs with AVX-512 when half of the free memory holds the copy. The base is not to
            change afterwards.
        quant, dtype, device: as `load_base` takes them.

    Raises: UnsupportedError for a base that is no causal model with a key-value cache; StateError for one that has
        adapters attached.
    """

    def __init__(
        self,
        base: str | tuple[Any, Any],
        adapters: str | Path | Mapping[str, Adapter | str | Path] | None = None,
        *,
        limits: Limits | None = None,
        memory: int = 2**30,
        prefixes: int = 2**28,
        prepack: bool | None = None,
        **loading: Any,
    ) -> None:
        keep_freed_memory()
        self.model, self.tokenizer = load_base(base, **loading) if isinstance(base, str) else base
        if names := attached(self.model):
            raise StateError("the engine serves a base as it is", got=f"attached: {', '.join(names)}", hint="detach")
        self.decoder: Decoder = decoder_of(self.model.eval(), prepack)
        self.store = Store(self.model, self.decoder, memory, self.tokenizer)
        self.scheduler: Scheduler[Ticket] = Scheduler(limits or Limits())
        most = self.scheduler.limits
        self.cache = self.decoder.cache(most.rows, most.cache // most.rows)
        self.prefixes = Prefixes(prefixes)
        self.terms = BatchTerms()
        self.context: int = min(positions(self.model) or self.scheduler.limits.cache, self.scheduler.limits.cache)
        """Tokens that a prompt and its answer may have together."""
        self.ends = ends_of(self.model, self.tokenizer)
        self.vocabulary = vocabulary_of(self.model, self.tokenizer)
        for name, source in self._named(adapters).items():
            self.store.register(name, source)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is there, and read nothing more."""
        for ticket in [*self.scheduler.running, *(one for queue in self.scheduler.queues.values() for one in queue)]:
            self.cancel(ticket)
        self.store.close()

    def _named(self, adapters: str | Path | Mapping[str, Adapter | str | Path] | None) -> Mapping[str, Adapter | Path]:
        """Names and what they mean; what a folder holds and cannot be used is noted."""
        if isinstance(adapters, str | Path):
            found = Folder(adapters).found(self.store.fingerprint)
            self.store.unfit |= found.refused
            return found.adapters
        return {name: one if isinstance(one, Adapter) else adapter_of(one) for name, one in (adapters or {}).items()}

    # Requests --------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, request: Request) -> Ticket:
        """Let a request wait its turn; `step` brings it on.

        Raises: UsageError for an empty or too long prompt, for ids that are no tokens in it or in `logit_bias`, or an
            unknown adapter; ResourceError when too many wait.
            What is wrong with an adapter shows when it is read, and becomes the ticket's fault.
        """
        if not 0 < len(request.prompt) < self.context:
            got = f"{len(request.prompt):,} tokens"
            raise UsageError("a prompt of an impossible length", got=got, expected=f"1 to {self.context - 1:,}")
        sampling = request.sampling
        self.vocabulary.check(request.prompt, "prompt")
        self.vocabulary.check(sampling.logit_bias, "logit_bias")
        guide = Guide(sampling.schema, self.tokenizer) if sampling.schema is not None else None
        held = self.store.hold([*request.adapters])
        ticket = Ticket(
            request,
            [*request.prompt],
            min(len(request.prompt) + sampling.max_tokens, self.context),
            held,
            Sampler(sampling, request.prompt, guide, self.vocabulary),
            Writer(self.tokenizer, sampling.stop),
        )
        if not self.scheduler.offer(ticket):
            self.store.let_go(held)
            raise ResourceError("too many requests wait", got=f"{self.scheduler.waiting:,}", hint="ask again later")
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request wherever it is; does nothing to one that is done."""
        if not ticket.done:
            if self.scheduler.withdraw(ticket):
                self.store.let_go(ticket.held)
                ticket.fault = _CANCELLED
            else:
                self._leave(ticket, _CANCELLED)

    def generate(
        self,
        prompts: str | Iterable[str],
        adapters: Sequence[str | Mapping[str, float] | None] | str | Mapping[str, float] | None = None,
        **sampling: Any,
    ) -> Iterator[Reply]:
        """Continue prompts, all at once; replies come in the order of the prompts.

        Args:
            prompts: texts, or one. What the tokenizer puts around texts is added, but no second beginning of a
                sequence to a text that has one.
            adapters: one for all, or one for each prompt: a name, a mapping of names to weights, or None for the base.
            sampling: fields of `Sampling`.

        Raises: what `submit` raises, and the fault of a request.
        """
        listed = texts(prompts, "prompts")
        one = adapters is None or isinstance(adapters, str | Mapping)
        each: list[Any] = [adapters] * len(listed) if one else [*(adapters or ())]
        if len(each) != len(listed):
            raise UsageError("one adapter a prompt", got=f"{len(each)} adapters", expected=str(len(listed)))
        tickets: list[Ticket] = []
        try:
            for prompt, adapter in zip(listed, each, strict=True):
                chosen = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter or {})
                ids = encoded(self.tokenizer, prompt)
                tickets.append(self.submit(Request(ids, chosen, Sampling(**sampling))))
            for ticket in tickets:
                while not ticket.done:
                    self.step()
                if ticket.fault:
                    raise ticket.fault
                assert ticket.reply
                yield ticket.reply
        finally:
            for ticket in tickets:
                self.cancel(ticket)

    # A step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> int:
        """Bring everybody on by one step. Gives the tokens that went through the model; 0 when nobody could go on."""
        self._admit()
        running = self.scheduler.running
        planned = self.scheduler.plan()
        if not planned:
            return 0
        chunks = [Chunk(row, running[row].read, count) for row, count in planned]
        chunks.sort(key=lambda one: not one.continues)
        ends = [one.start + one.length == running[one.row].length for one in chunks]
        tokens = [one for chunk in chunks for one in running[chunk.row].ids[chunk.start : chunk.start + chunk.length]]
        wanted = tuple(number for number, at_end in enumerate(ends) if at_end)
        step = StepInput(torch.tensor(tokens, device=self.decoder.like.device), tuple(chunks), wanted)
        there = self.terms.look([running[chunk.row].mix for chunk in chunks], self.decoder.parts(step))
        logits = self.decoder(step, self.cache, self.terms if there else None)
        for chunk in chunks:
            running[chunk.row].read += chunk.length
        self._settle([running[chunks[number].row] for number in wanted], logits)
        return len(tokens)

    def _admit(self) -> None:
        """Let in whom there is room for, and let those go on who waited for another to read what they begin with."""
        scheduler = self.scheduler

        def ready(ticket: Ticket) -> bool:
            return self.store.ready(ticket.held, at_once=not scheduler.running)

        admitted = scheduler.admit(ready)
        if not scheduler.running and scheduler.waiting:
            self.store.wait(1.0)
            admitted = scheduler.admit(ready)
        for ticket in admitted:
            try:
                loaded = [self.store.take(version) for version in ticket.held]
                ticket.begin(loaded)
            except GossamerError as error:
                self._leave(ticket, error)
        if scheduler.running:
            self.cache.fit(len(scheduler.running), max(one.length for one in scheduler.running))
        for ticket in [one for one in scheduler.running if one.rests or not one.read]:
            self._reuse(ticket)

    def _reuse(self, ticket: Ticket) -> None:
        """Copy what was read of its beginning before; rest while another reads it."""
        running, ticket.rests = self.scheduler.running, False
        row = running.index(ticket)
        others = [(common(one.ids, ticket.ids), one) for one in running[:row] if one.owner == ticket.owner]
        alike, other = max(others, key=lambda one: one[0], default=(0, ticket))
        found = self.prefixes.find(ticket.owner, ticket.ids)
        if found and found[1] >= alike:
            self.cache.give(row, found[0], found[1])
            ticket.read = ticket.reused = found[1]
        elif alike >= LEAST and other.read >= alike:
            self.cache.copy(running.index(other), row, alike)
            ticket.read = ticket.reused = alike
        elif alike >= LEAST:
            ticket.rests = True

    def _settle(self, tickets: Sequence[Ticket], logits: Tensor) -> None:
        """Draw a token for each, and let those leave that are done."""
        wide = logits.float()
        best, likeliest = self.vocabulary.drawable(wide).max(1)
        found = torch.stack([wide.logsumexp(1), best, likeliest.double()]).T.tolist()
        for number, (ticket, (total, top, first)) in enumerate(zip(tickets, found, strict=True)):
            if not math.isfinite(total):
                names = ", ".join(loaded.name for loaded, _ in ticket.mix)
                self._leave(ticket, NonFiniteError("the logits are not finite", where=names or "the base"))
                continue
            try:
                plain = ticket.sampler.plain
                drawn = Drawn(int(first), top - total, ()) if plain else ticket.sampler.draw(wide[number].cpu())
                finish = self._accept(ticket, drawn)
            except GossamerError as error:
                self._leave(ticket, error)
            else:
                if finish:
                    self._leave(ticket, finish)

    def _accept(self, ticket: Ticket, drawn: Drawn) -> Finish | None:
        """Write a token down; how the request ends, if this was its last one."""
        ticket.add(drawn)
        sampling, writer = ticket.request.sampling, ticket.writer
        if (drawn.token in self.ends or drawn.token in ticket.ends) and not sampling.ignore_eos:
            return "stop"
        writer.add(drawn.token)
        if writer.stopped or ticket.sampler.done:
            return "stop"
        return "length" if ticket.length >= ticket.most else None

    def _leave(self, ticket: Ticket, end: Finish | GossamerError) -> None:
        """Free a row: keep what others may begin with, and let the last row take the free place."""
        running = self.scheduler.running
        row = running.index(ticket)
        if isinstance(end, GossamerError):
            ticket.fault = end
        else:
            ticket.finish(end)
            read = ticket.ids[: ticket.read]
            if self.prefixes.wants(ticket.owner, read):
                self.prefixes.add(ticket.owner, read, self.cache.keep(row, ticket.read))
        self.store.let_go(ticket.held)
        moved = self.scheduler.leave(row)
        if moved is not None:
            self.cache.copy(moved, row, running[row].read)
        if not running:
            self.cache.trim()


_CANCELLED = StateError("the request was cancelled")


def decoder_of(model: Any, prepack: bool | None = None) -> Decoder:
    """The fastest that knows the model. Raises `UnsupportedError`."""
    if CachedDecoder.takes(model):
        if prepack is None:
            free = free_bytes(torch.device("cpu")) or 0
            wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
            prepack = wide and CachedDecoder.prepacked_bytes(model) <= free // 2
        return CachedDecoder(model, prepack)
    if reason := refusal(model):
        raise UnsupportedError("the engine does not serve this model", got=type(model).__name__, expected=reason)
    return TransformersDecoder(model)
