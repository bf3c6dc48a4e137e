"""One base, any number of adapters, another one in every row: schedule, run, settle, until none waits.

schedule   which sequences take part in the next step, with how many tokens (`scheduler`, which knows no tensors)
run        all of them through the model at once; each row with its own adapters (`running.steps`, `kernels.routed`)
settle     draw a token for each that came to its end, finish those that are done, free their rows
"""

import math
from collections.abc import Iterable, Iterator, Mapping
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
from gossamer.serving.detokenizer import Detokenizer
from gossamer.serving.folder import Folder
from gossamer.serving.grammar import Grammar
from gossamer.serving.prefixes import LEAST, PrefixCache, common
from gossamer.serving.sampling import FinishReason, SampledToken, Sampler, Sampling
from gossamer.serving.scheduler import Limits, Scheduler
from gossamer.serving.sequence import Reply, Sequence, SequenceState
from gossamer.serving.store import AdapterStore
from gossamer.serving.terms import BatchTerms, DecoderTarget
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
        self.store = AdapterStore(self.model, self.tokenizer, DecoderTarget(self.model, self.decoder), memory)
        self.scheduler = Scheduler(limits or Limits())
        most = self.scheduler.limits
        self.cache = self.decoder.cache(most.rows, most.cache // most.rows)
        self.prefixes = PrefixCache(prefixes)
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
        for sequence in [*self.scheduler.running, *(one for queue in self.scheduler.queues.values() for one in queue)]:
            self.cancel(sequence)
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
        """Whether a sequence runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, sequence: Sequence) -> Sequence:
        """Let a new sequence wait its turn, and give it back; `step` brings it on.

        Raises: UsageError for an empty or too long prompt, for ids that are no tokens in it or in `logit_bias`, or an
            unknown adapter; ResourceError when too many wait; StateError for one that was submitted before.
            What is wrong with an adapter shows when it is read, and becomes the sequence's fault.
        """
        prompt, sampling = sequence.prompt, sequence.sampling
        if sequence.state is not SequenceState.NEW:
            raise StateError("a sequence is submitted once", got=sequence.state.value, hint="dataclasses.replace(it)")
        if not 0 < len(prompt) < self.context:
            got = f"{len(prompt):,} tokens"
            raise UsageError("a prompt of an impossible length", got=got, expected=f"1 to {self.context - 1:,}")
        self.vocabulary.check(prompt, "prompt")
        self.vocabulary.check(sampling.logit_bias, "logit_bias")
        grammar = Grammar(sampling.schema, self.tokenizer) if sampling.schema is not None else None
        sequence.most = min(sequence.most, self.context)
        sequence.sampler = Sampler(sampling, prompt, grammar, self.vocabulary)
        sequence.detokenizer = Detokenizer(self.tokenizer, sampling.stop)
        sequence.held = self.store.hold(sequence.adapters)
        if not self.scheduler.offer(sequence):
            self.store.let_go(sequence.held)
            raise ResourceError("too many requests wait", got=f"{self.scheduler.waiting:,}", hint="ask again later")
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; does nothing to one that is done or was not submitted."""
        if self.scheduler.withdraw(sequence):
            self.store.let_go(sequence.held)
            sequence.end(_CANCELLED)
        elif sequence.state in (SequenceState.RUNNING, SequenceState.PAUSED):
            self._leave(sequence, _CANCELLED)

    def generate(
        self,
        prompts: str | Iterable[str],
        adapters: Iterable[str | Mapping[str, float] | None] | str | Mapping[str, float] | None = None,
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
        sequences: list[Sequence] = []
        try:
            for prompt, adapter in zip(listed, each, strict=True):
                chosen = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter or {})
                ids = encoded(self.tokenizer, prompt)
                sequences.append(self.submit(Sequence(ids, chosen, Sampling(**sampling))))
            for sequence in sequences:
                while not sequence.done:
                    self.step()
                if sequence.fault:
                    raise sequence.fault
                assert sequence.reply
                yield sequence.reply
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    # A step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> int:
        """Bring every sequence on by a step. Gives the tokens that went through the model; 0 when none could go on."""
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
        """Let in what there is room for, and let those go on that paused while another read what they begin with."""
        scheduler = self.scheduler

        def ready(sequence: Sequence) -> bool:
            return self.store.ready(sequence.held, at_once=not scheduler.running)

        admitted = scheduler.admit(ready)
        if not scheduler.running and scheduler.waiting:
            self.store.wait(1.0)
            admitted = scheduler.admit(ready)
        for sequence in admitted:
            try:
                sequence.begin([self.store.take(version) for version in sequence.held])
            except GossamerError as error:
                self._leave(sequence, error)
        if scheduler.running:
            self.cache.fit(len(scheduler.running), max(one.length for one in scheduler.running))
        for sequence in [one for one in scheduler.running if not one.read]:
            self._reuse(sequence)

    def _reuse(self, sequence: Sequence) -> None:
        """Copy what was read of its beginning before; pause it while another reads that."""
        running, sequence.state = self.scheduler.running, SequenceState.RUNNING
        row, owner = running.index(sequence), sequence.owner
        others = [(common(one.ids, sequence.ids), one) for one in running[:row] if one.owner == owner]
        alike, other = max(others, key=lambda one: one[0], default=(0, sequence))
        found = self.prefixes.find(owner, sequence.ids)
        if found and found[1] >= alike:
            self.cache.give(row, found[0], found[1])
            sequence.read = sequence.reused = found[1]
        elif alike >= LEAST and other.read >= alike:
            self.cache.copy(running.index(other), row, alike)
            sequence.read = sequence.reused = alike
        elif alike >= LEAST:
            sequence.state = SequenceState.PAUSED

    def _settle(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Sample a token for each, and let those leave that are done."""
        wide = logits.float()
        best, likeliest = self.vocabulary.drawable(wide).max(1)
        found = torch.stack([wide.logsumexp(1), best, likeliest.double()]).T.tolist()
        for number, (sequence, (total, top, first)) in enumerate(zip(sequences, found, strict=True)):
            if not math.isfinite(total):
                names = ", ".join(loaded.name for loaded, _ in sequence.mix)
                self._leave(sequence, NonFiniteError("the logits are not finite", where=names or "the base"))
                continue
            try:
                sampler = sequence.sampler
                plain = SampledToken(int(first), top - total, ())
                finish = self._accept(sequence, plain if sampler.plain else sampler.draw(wide[number].cpu()))
            except GossamerError as error:
                self._leave(sequence, error)
            else:
                if finish:
                    self._leave(sequence, finish)

    def _accept(self, sequence: Sequence, sampled: SampledToken) -> FinishReason | None:
        """Write a token down; how the sequence ends, if this was its last one."""
        sequence.add(sampled)
        ends = sampled.token in self.ends or sampled.token in sequence.ends
        if ends and not sequence.sampling.ignore_eos:
            return "stop"
        sequence.detokenizer.add(sampled.token)
        if sequence.detokenizer.stopped or sequence.sampler.done:
            return "stop"
        return "length" if sequence.length >= sequence.most else None

    def _leave(self, sequence: Sequence, end: FinishReason | GossamerError) -> None:
        """Free a row: keep what others may begin with, and let the last row take the free place."""
        running = self.scheduler.running
        row = running.index(sequence)
        sequence.end(end)
        if sequence.state is SequenceState.FINISHED:
            read = sequence.ids[: sequence.read]
            if self.prefixes.wants(sequence.owner, read):
                self.prefixes.add(sequence.owner, read, self.cache.keep(row, sequence.read))
        self.store.let_go(sequence.held)
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
