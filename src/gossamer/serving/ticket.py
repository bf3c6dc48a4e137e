"""A request on its way through the engine."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from gossamer.errors import GossamerError, UnsupportedError
from gossamer.serving.request import Finish, Reply, Request
from gossamer.serving.sampling import Drawn, Sampler
from gossamer.serving.store import Loaded, Version
from gossamer.serving.terms import Mix
from gossamer.serving.text import Writer


@dataclass(eq=False)
class Ticket:
    """What has become of a request so far.

    Attributes:
        ids: the prompt and the tokens drawn so far. most: how many there may be in the end.
        held: the versions of its adapters that it was submitted with. mix: they, once in memory, with their weights.
        read: tokens whose keys and values are in the cache. reused: those of them that another request had read.
        rests: another is reading what this one begins with.
        logprobs: of the drawn tokens. tops: the likeliest in the place of each, where they were asked for.
        ends: tokens that end it, beside the base's: those of its adapters' own tokenizers.
        reply, fault: one of them is there once it is done.
    """

    request: Request
    ids: list[int]
    most: int
    held: Sequence[Version]
    sampler: Sampler
    writer: Writer
    mix: Mix = ()
    read: int = 0
    reused: int = 0
    passed: int = 0
    rests: bool = False
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    ends: frozenset[int] = frozenset()
    reply: Reply | None = None
    fault: GossamerError | None = None

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.request.tenant

    @property
    def length(self) -> int:
        """Tokens of the prompt and those drawn so far."""
        return len(self.ids)

    @property
    def drawn(self) -> list[int]:
        """The answer's tokens so far."""
        return self.ids[len(self.request.prompt) :]

    @property
    def text(self) -> str:
        """The answer so far, as much of it as is certain."""
        return self.writer.text

    @property
    def done(self) -> bool:
        """Whether there is a reply or a fault."""
        return self.reply is not None or self.fault is not None

    @property
    def digests(self) -> Mapping[str, str]:
        """Of the adapters that make its tokens, by name; known when the first token is."""
        return {loaded.name: loaded.digest for loaded, _ in self.mix}

    @property
    def owner(self) -> Hashable:
        """Whom its keys and values belong to."""
        return self.tenant, tuple((loaded.digest, weight) for loaded, weight in self.mix)

    def begin(self, loaded: Sequence[Loaded]) -> None:
        """Its adapters are there. Raises `UnsupportedError` for a mix of what cannot be mixed."""
        weights = [*self.request.adapters.values()]
        for one in loaded:
            if not one.is_sum and weights != [1.0]:
                raise UnsupportedError(
                    "only sums of low-rank terms can be weighted and mixed", where=one.name, got=one.method
                )
        self.mix = tuple((one, weight) for one, weight in zip(loaded, weights, strict=True) if weight)
        self.ends = frozenset().union(*(one.chat_format.ends for one, _ in self.mix))

    def add(self, drawn: Drawn) -> None:
        """Take its next token."""
        self.ids.append(drawn.token)
        self.logprobs.append(drawn.logprob)
        if self.request.sampling.top_logprobs:
            self.tops.append(drawn.top)
        self.sampler.seen(drawn.token)

    def finish(self, end: Finish) -> None:
        """It is done: the reply."""
        self.writer.end()
        self.reply = Reply(self.text, tuple(self.drawn), tuple(self.logprobs), self.digests, end, tops=tuple(self.tops))
