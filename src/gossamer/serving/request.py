"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gossamer.errors import UsageError

Finish = Literal["stop", "length"]
Top = tuple[tuple[int, float], ...]
"""The likeliest tokens in one place, each with its log-probability."""


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
        top_logprobs: so many of the likeliest tokens are told in the place of each.
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


@dataclass(frozen=True)
class Request:
    """A prompt in tokens, the adapters that answer it, and how.

    Attributes:
        adapters: name -> weight. Empty asks the base.
        tenant: whose it is; the engine is fair between tenants.

    Raises: UsageError for a weight that is no finite number.
    """

    prompt: tuple[int, ...]
    adapters: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    tenant: str = ""

    def __post_init__(self) -> None:
        for name, weight in self.adapters.items():
            if not math.isfinite(weight):
                raise UsageError("an adapter's weight is a finite number", where=name, got=str(weight))


@dataclass(frozen=True)
class Reply:
    """What a finished request got.

    Attributes:
        text: without the prompt, and without the stop text that ended it.
        tokens: all that were drawn, an end-of-sequence token among them.
        logprobs: natural logarithm of the probability of each, under softmax(logits).
        digests: of the adapters that made these tokens, by name.
        finish: "stop" for an end-of-sequence token, a stop text or a schema that is satisfied, "length" for max_tokens
            or a full context.
        tops: the likeliest in the place of each token, where they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    digests: Mapping[str, str]
    finish: Finish
    tops: tuple[Top, ...] = ()
