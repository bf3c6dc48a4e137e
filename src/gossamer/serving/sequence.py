"""A request from its prompt to its reply: the one value that the API, scheduler, engine and sampler hand on."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from gossamer.errors import GossamerError, UnsupportedError, UsageError
from gossamer.serving.sampling import FinishReason, SampledToken, Sampler, Sampling, TopLogprobs

if TYPE_CHECKING:
    from gossamer.serving.detokenizer import Detokenizer
    from gossamer.serving.store import AdapterVersion, LoadedAdapter
    from gossamer.serving.terms import LoadedMix


class SequenceState(Enum):
    """Where a sequence is on its way. `PAUSED`: it has a row, and another row reads what both begin with."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Reply:
    """What a sequence gave, or what came since it was last looked at.

    Attributes:
        text: without the prompt, and without the stop text that ended it.
        tokens: all that were sampled, an end-of-sequence token among them.
        logprobs: natural logarithm of the probability of each, under softmax(logits).
        digests: of the adapters that made these tokens, by name.
        finish: "stop" for an end-of-sequence token, a stop text or a schema that is satisfied, "length" for max_tokens
            or a full context; None while it goes on.
        tops: the likeliest in the place of each token, where they were asked for.
        reused: tokens of the prompt that were not read again.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    finish: FinishReason | None = None
    tops: tuple[TopLogprobs, ...] = ()
    reused: int = 0


@dataclass(eq=False)
class Sequence:
    """A prompt in tokens, the adapters that answer it, how, and what has become of it.

    `dataclasses.replace(sequence)` is a new one that asks the same.

    Attributes:
        adapters: name -> weight. Empty asks the base.
        tenant: whose it is; the engine is fair between tenants.
        ids: the prompt and the tokens sampled so far. most: how many there may be in the end.
        held: the versions of its adapters that it was submitted with. mix: they, once in memory, with their weights.
        read: tokens whose keys and values are in the cache. reused: those of them that another sequence had read.
        passed: how many were let in before it although it was its turn.
        logprobs, tops: of the sampled tokens, as in `Reply`.
        ends: tokens that end it, beside the base's: those of its adapters' own tokenizers.
        finish: how it ended, if it is finished. fault: why it could not be, if it failed.

    Raises: UsageError for a weight that is no finite number.
    """

    prompt: tuple[int, ...]
    adapters: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""
    state: SequenceState = field(default=SequenceState.NEW, init=False)
    ids: list[int] = field(init=False, repr=False)
    most: int = field(init=False)
    held: tuple[AdapterVersion, ...] = field(default=(), init=False, repr=False)
    mix: LoadedMix = field(default=(), init=False, repr=False)
    sampler: Sampler = field(init=False, repr=False)
    detokenizer: Detokenizer = field(init=False, repr=False)
    read: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    passed: int = field(default=0, init=False)
    logprobs: list[float] = field(default_factory=list, init=False, repr=False)
    tops: list[TopLogprobs] = field(default_factory=list, init=False, repr=False)
    ends: frozenset[int] = field(default=frozenset(), init=False)
    finish: FinishReason | None = field(default=None, init=False)
    fault: GossamerError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name, weight in self.adapters.items():
            if not math.isfinite(weight):
                raise UsageError("an adapter's weight is a finite number", where=name, got=str(weight))
        self.ids = [*self.prompt]
        self.most = len(self.ids) + self.sampling.max_tokens
        self._looked_at = (0, 0)

    @property
    def length(self) -> int:
        """Tokens of the prompt and those sampled so far."""
        return len(self.ids)

    @property
    def drawn(self) -> list[int]:
        """The answer's tokens so far."""
        return self.ids[len(self.prompt) :]

    @property
    def text(self) -> str:
        """The answer so far, as much of it as is certain."""
        return self.detokenizer.text

    @property
    def done(self) -> bool:
        """Whether it is finished or failed."""
        return self.state in (SequenceState.FINISHED, SequenceState.FAILED)

    @property
    def digests(self) -> Mapping[str, str]:
        """Of the adapters that make its tokens, by name; known when the first token is."""
        return {loaded.name: loaded.digest for loaded, _ in self.mix}

    @property
    def owner(self) -> Hashable:
        """Whom its keys and values belong to."""
        return self.tenant, tuple((loaded.digest, weight) for loaded, weight in self.mix)

    @property
    def reply(self) -> Reply | None:
        """All of it, once it is finished."""
        return self._reply(0, 0) if self.state is SequenceState.FINISHED else None

    def news(self) -> Reply | None:
        """What came since the last call; None where nothing did and it goes on."""
        before, tokens = self._looked_at, len(self.ids) - len(self.prompt)
        if not self.done and tokens == before[0]:
            return None
        self._looked_at = tokens, len(self.text)
        return self._reply(*before)

    def _reply(self, tokens: int, letters: int) -> Reply:
        fresh, logprobs = tuple(self.ids[len(self.prompt) + tokens :]), tuple(self.logprobs[tokens:])
        tops = tuple(self.tops[tokens:])
        return Reply(self.text[letters:], fresh, logprobs, self.digests, self.finish, tops, self.reused)

    def begin(self, loaded: list[LoadedAdapter]) -> None:
        """Take its adapters, which are in memory. Raises `UnsupportedError` for a mix of what cannot be mixed."""
        weights = [*self.adapters.values()]
        for one in loaded:
            if not one.placed.is_sum and weights != [1.0]:
                raise UnsupportedError(
                    "only sums of low-rank terms can be weighted and mixed", where=one.name, got=one.method
                )
        self.mix = tuple((one, weight) for one, weight in zip(loaded, weights, strict=True) if weight)
        self.ends = frozenset().union(*(one.chat_format.ends for one, _ in self.mix))

    def add(self, sampled: SampledToken) -> None:
        """Take its next token. Raises `StateError` if its schema does not allow it."""
        self.ids.append(sampled.token)
        self.logprobs.append(sampled.logprob)
        if self.sampling.top_logprobs:
            self.tops.append(sampled.top)
        self.sampler.seen(sampled.token)

    def end(self, end: FinishReason | GossamerError) -> None:
        """Finish it, or let it fail."""
        if isinstance(end, GossamerError):
            self.state, self.fault = SequenceState.FAILED, end
        else:
            self.detokenizer.end()
            self.state, self.finish = SequenceState.FINISHED, end
