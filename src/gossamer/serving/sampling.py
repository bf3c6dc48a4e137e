"""How one sequence's tokens are sampled from its logits."""

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gossamer.errors import StateError, UsageError
from gossamer.serving.grammar import Grammar
from gossamer.serving.vocabulary import Vocabulary

FinishReason = Literal["stop", "length"]
TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest tokens in one place, each with its log-probability."""
LogitsProcessor = Callable[[Tensor], None]
"""Changes the logits (V,) of one sequence, in place."""
_FIRST = 1024
_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        max_tokens: new tokens at most.
        temperature: logits are divided by it; 0 takes the likeliest.
        top_p: the fewest likeliest tokens that have this much probability together; 1 leaves all.
        top_k: so many of the likeliest; 0 leaves all.
        min_p: tokens at least this likely in proportion to the likeliest one; 0 leaves all.
        presence_penalty: taken from the logits of tokens that were drawn before.
        frequency_penalty: the same, as often as they were drawn.
        repetition_penalty: logits of tokens in the prompt or the answer are divided by it, negative ones multiplied.
        logit_bias: token id -> what is added to its logit.
        seed: of this request's own random numbers, which no other request draws from; None for a fresh one.
        stop: texts that end it, or one; they are not part of the answer. The text of a special token is one too.
        ignore_eos: go on after the end-of-sequence token.
        top_logprobs: so many of the likeliest tokens are given in the place of each.
        schema: a JSON schema that the answer will satisfy, or "json" for any object.

    Raises: UsageError for a value that is out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    schema: str | None = None

    def __hash__(self) -> int:
        return hash((self.max_tokens, self.temperature, self.seed, self.stop, self.schema))

    def __post_init__(self) -> None:
        # a text alone is one stop text, not its letters
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        biases = self.logit_bias
        ranges = {
            "max_tokens": (1 <= self.max_tokens < 2**31, "1 to 2^31 - 1"),
            "temperature": (0 <= self.temperature <= 100, "0 to 100"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (0 <= self.top_k < 2**31, "0 to 2^31 - 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            "logit_bias": (
                len(biases) <= 1024 and all(key >= 0 and abs(bias) <= 100 for key, bias in biases.items()),
                "at most 1,024 token ids, each with -100 to 100",
            ),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            "stop": (
                len(self.stop) <= 16 and all(0 < len(one) <= 256 for one in self.stop),
                "at most 16 texts of 1 to 256 characters",
            ),
            "top_logprobs": (0 <= self.top_logprobs <= 20, "0 to 20"),
            "schema": (self.schema is None or len(self.schema) <= 2**16, "at most 65,536 characters"),
        }
        for name, (fine, expected) in ranges.items():
            if not fine:
                raise UsageError("out of range", where=name, got=str(getattr(self, name))[:80], expected=expected)


class SampledToken(NamedTuple):
    """A token, the logarithm of its probability, and the likeliest in its place."""

    token: int
    logprob: float
    top: TopLogprobs


class Sampler:
    """Samples the tokens of one sequence, from random numbers of its own.

        p = softmax(processed logits / temperature), cut by top_k, min_p and top_p, in this order

    Logits are processed in this order: tokens that the grammar forbids; biases; presence and frequency of sampled
    tokens; repetition. The probabilities that are given are those of the model itself, before all of this.

    Args:
        prompt: whose tokens count as repeated.
        grammar: what the answer has to satisfy.
        vocabulary: the rows that are tokens, which alone are sampled and given; all of them without one.

    Attributes:
        plain: the likeliest token is all that is asked for, so that `draw` need not be called.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        grammar: Grammar | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.sampling, self.grammar, self.vocabulary = sampling, grammar, vocabulary
        self.processors: list[LogitsProcessor] = [] if grammar is None else [grammar.mask]
        if sampling.logit_bias:
            self.processors.append(self._bias)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.processors.append(self._penalise_sampled)
        if sampling.repetition_penalty != 1:
            self.processors.append(self._penalise_repeated)
        self.plain = not (sampling.temperature or sampling.top_logprobs or self.processors)
        self.counts: Counter[int] = Counter()
        self.prompt = frozenset(prompt if sampling.repetition_penalty != 1 else ())
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.generator = torch.Generator().manual_seed(seed) if sampling.temperature else None

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        return self.grammar is not None and self.grammar.done

    def draw(self, logits: Tensor) -> SampledToken:
        """From logits (V,) on the CPU in float32, which are left as they are.

        Raises: StateError when nothing is left to draw, or the logits are not finite.
        Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1 (nucleus sampling); Keskar et al. 2019,
        arXiv:1909.05858, section 4.1 (repetition).
        """
        total = logits.logsumexp(0)
        if not bool(total.isfinite()):
            raise StateError("the logits are not finite", got=str(total.item()))
        if self.vocabulary is not None:
            logits = self.vocabulary.drawable(logits)
        processed = logits.clone()
        for process in self.processors:
            process(processed)
        if not bool((processed > -torch.inf).any()):
            raise StateError("no token is left to draw", hint="the schema or the biases forbid all of them")
        token = int(processed.argmax()) if self.generator is None else self._drawn(processed - processed.max())
        values, ids = logits.topk(min(self.sampling.top_logprobs, len(logits)))
        top = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
        return SampledToken(token, (logits[token] - total).item(), top)

    def seen(self, token: int) -> None:
        """A token was drawn, here or elsewhere. Raises `StateError` if the grammar does not allow it."""
        self.counts[token] += 1
        if self.grammar is not None:
            self.grammar.advance(token)

    def _bias(self, logits: Tensor) -> None:
        for token, bias in self.sampling.logit_bias.items():
            if token < len(logits):
                logits[token] += bias

    def _penalise_sampled(self, logits: Tensor) -> None:
        if self.counts:
            often = torch.tensor([*self.counts.values()], dtype=logits.dtype)
            logits[[*self.counts]] -= self.sampling.presence_penalty + self.sampling.frequency_penalty * often

    def _penalise_repeated(self, logits: Tensor) -> None:
        if repeated := sorted(self.prompt | self.counts.keys()):
            before, penalty = logits[repeated], self.sampling.repetition_penalty
            after = torch.where(before > 0, before / penalty, before * penalty)
            logits[repeated] = after.clamp(max=torch.finfo(after.dtype).max)  # what overflows must not become NaN later

    def _drawn(self, below: Tensor) -> int:
        """From logits less the largest, so that no division by a small temperature overflows."""
        sampling = self.sampling
        scaled = below / max(sampling.temperature, _COLDEST)
        if sampling.top_k:
            least = scaled.topk(min(sampling.top_k, len(scaled))).values[-1]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        chances = scaled.softmax(0)
        if sampling.min_p:
            chances[chances < sampling.min_p * chances.max()] = 0.0
            chances /= chances.sum()
        if sampling.top_p < 1:
            chances = _nucleus(chances, sampling.top_p)
        return int(torch.multinomial(chances, 1, generator=self.generator))


def _nucleus(chances: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest that have so much together; sorts them all only where the first thousand are too few."""
    for count in (min(_FIRST, len(chances)), len(chances)):
        ordered, order = chances.topk(count)
        before = ordered.cumsum(0) - ordered
        if before[-1] >= top_p or count == len(chances):
            break
    kept = torch.zeros_like(chances)
    enough = before >= top_p  # what stands before it; never so before the first, though top_p may be 0 in float32
    enough[0] = False
    inside = order[~enough]
    kept[inside] = chances[inside]
    return kept
