"""The next token of one request, from its logits."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.errors import StateError
from gossamer.serving.guidance import Guide
from gossamer.serving.request import Sampling, Top
from gossamer.serving.vocabulary import Vocabulary

_FIRST = 1024
_COLDEST = 1e-6


class Drawn(NamedTuple):
    """A token, the logarithm of its probability, and the likeliest in its place."""

    token: int
    logprob: float
    top: Top


class Sampler:
    """Draws the tokens of one request, from random numbers of its own.

        p = softmax(changed logits / temperature), cut by top_k, min_p and top_p, in this order

    Changes, in this order: tokens that the guide forbids; biases; presence and frequency of drawn tokens; repetition.
    The probabilities it tells are those of the model itself, before all of this.

    Args:
        prompt: whose tokens count as repeated.
        guide: what the answer has to satisfy.
        vocabulary: the rows that are tokens, which alone are drawn and told; all of them without one.

    Attributes:
        plain: the likeliest token is all that is asked for, so that `draw` need not be called.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        guide: Guide | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.sampling, self.guide, self.vocabulary = sampling, guide, vocabulary
        penalised = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
        self.plain = not (sampling.temperature or penalised or sampling.logit_bias or sampling.top_logprobs or guide)
        self.counts: Counter[int] = Counter()
        self.repeated = {*prompt} if sampling.repetition_penalty != 1 else set[int]()
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.generator = torch.Generator().manual_seed(seed) if sampling.temperature else None

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        return self.guide is not None and self.guide.done

    def draw(self, logits: Tensor) -> Drawn:
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
        changed = self._changed(logits)
        if not bool((changed > -torch.inf).any()):
            raise StateError("no token is left to draw", hint="the schema or the biases forbid all of them")
        token = int(changed.argmax()) if self.generator is None else self._drawn(changed - changed.max())
        values, ids = logits.topk(min(self.sampling.top_logprobs, len(logits)))
        top = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
        return Drawn(token, (logits[token] - total).item(), top)

    def seen(self, token: int) -> None:
        """A token was drawn, here or elsewhere. Raises `StateError` if the guide does not allow it."""
        self.counts[token] += 1
        if self.sampling.repetition_penalty != 1:
            self.repeated.add(token)
        if self.guide is not None:
            self.guide.advance(token)

    def _changed(self, logits: Tensor) -> Tensor:
        sampling, changed = self.sampling, logits.clone()
        if self.guide is not None:
            self.guide.mask(changed)
        for token, bias in sampling.logit_bias.items():
            if token < len(changed):
                changed[token] += bias
        if self.counts and (sampling.presence_penalty or sampling.frequency_penalty):
            often = torch.tensor([*self.counts.values()], dtype=changed.dtype)
            changed[[*self.counts]] -= sampling.presence_penalty + sampling.frequency_penalty * often
        if self.repeated:
            own = torch.tensor(sorted(self.repeated))
            before, penalty = changed[own], sampling.repetition_penalty
            after = torch.where(before > 0, before / penalty, before * penalty)
            changed[own] = after.clamp(max=torch.finfo(after.dtype).max)  # what overflows must not become NaN later
        return changed

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
