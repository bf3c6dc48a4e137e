"""Answers in OpenAI's shapes, whole and piece by piece. Each names the adapters that made it, with their digests."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from gossamer.serving.api.worker import Progress

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int
    drawn: int = 0
    reused: int = 0

    def fields(self) -> dict[str, Any]:
        """As OpenAI names them."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.drawn,
            "total_tokens": self.prompt + self.drawn,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }


@dataclass
class Answer:
    """One sequence as far as it came."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish: str | None = None

    def add(self, progress: Progress) -> None:
        """Take what is new."""
        self.text += progress.text
        self.tokens += progress.tokens
        self.logprobs += progress.logprobs
        self.tops += progress.tops
        self.finish = progress.finish


class Form:
    """How one request is answered.

    Args:
        chat: whether in the shapes of chat completions; else of plain ones.
        model: as the client named it. scales: the adapters that he asked for.
        tokenizer: for the texts of tokens whose logarithms are wanted.
        logprobs: whether they are.
    """

    def __init__(self, chat: bool, model: str, scales: Mapping[str, float], tokenizer: Any, logprobs: bool) -> None:
        self.chat, self.model, self.scales, self.tokenizer, self.logprobs = chat, model, scales, tokenizer, logprobs
        self.number = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.letters: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage, digests: Mapping[str, str]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                "index": index,
                **({"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}),
                "logprobs": self._logprobs(index, one),
                "finish_reason": one.finish,
            }
            for index, one in enumerate(answers)
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage.fields()} | self.made_by(digests)

    def chunk(self, progress: Progress, first: bool) -> dict[str, Any]:
        """A piece of a stream: what is new of one sequence."""
        new = Answer(progress.text, [*progress.tokens], [*progress.logprobs], [*progress.tops], progress.finish)
        role = {"role": "assistant"} if first else {}
        said = {"delta": role | {"content": new.text}} if self.chat else {"text": new.text}
        logprobs = self._logprobs(progress.index, new)
        choice = {"index": progress.index, **said, "logprobs": logprobs, "finish_reason": new.finish}
        named = self.made_by(progress.digests) if first or progress.finish else {}
        return self._head(self._piece) | {"choices": [choice]} | named

    def last(self, usage: Usage, digests: Mapping[str, str]) -> dict[str, Any]:
        """The piece that tells the usage, after all others."""
        return self._head(self._piece) | {"choices": [], "usage": usage.fields()} | self.made_by(digests)

    def made_by(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """Which adapters made it: those with a weight other than 0."""
        adapters = [{"id": name, "scale": self.scales[name], "digest": digest} for name, digest in digests.items()]
        return {"gossamer": {"adapters": adapters}}

    @property
    def _piece(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.number, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, index: int, new: Answer) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        tops = new.tops or [()] * len(new.tokens)
        if self.chat:
            listed = [
                self._entry(token, value) | {"top_logprobs": [self._entry(*one) for one in top]}
                for token, value, top in zip(new.tokens, new.logprobs, tops, strict=True)
            ]
            return {"content": listed, "refusal": None}
        texts, offsets = [self._text(token) for token in new.tokens], []
        for text in texts:
            offsets.append(self.letters.get(index, 0))
            self.letters[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(value) for value in new.logprobs],
            "top_logprobs": [{self._text(token): _finite(value) for token, value in top} for top in tops],
            "text_offset": offsets,
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        whole = "\ufffd" not in text  # else a part of a character, which has no text of its own
        return {"token": text, "logprob": _finite(value), "bytes": [*text.encode()] if whole else None}

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)


def named(digests: Mapping[str, str]) -> dict[str, str]:
    """The header that names the adapters of an answer."""
    listed = ", ".join(f"{quote(name, safe='')}=sha256:{digest}" for name, digest in digests.items())
    return {"x-gossamer-adapter": listed or "none"}


def _finite(value: float) -> float:
    return max(value, LEAST_LOGPROB)
