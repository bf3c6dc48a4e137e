"""Answers in OpenAI's shapes, whole and piece by piece. Each names the adapters that made it, with their digests."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from gossamer.serving.api.worker import Progress
from gossamer.serving.sampling import TopLogprobs
from gossamer.serving.sequence import Reply
from gossamer.serving.spelling import Spelled, Spelling

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
        self.spellings: dict[int, Spelling] = {}

    def whole(self, answers: Sequence[Reply], usage: Usage, digests: Mapping[str, str]) -> dict[str, Any]:
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

    def chunks(self, progress: Progress, first: bool) -> Iterator[dict[str, Any]]:
        """The pieces of a stream that tell what is new of one sequence.

        That it is finished stands in a piece of its own, as clients read no text there.
        """
        new = progress.reply
        made = self.made_by(new.digests)
        listed = self._logprobs(progress.index, new)
        if new.tokens or new.text or first:
            yield self._chunk(progress.index, new.text, first, listed, None, made if first else {})
        if new.finish:
            none = self._logprobs(progress.index, Reply())
            yield self._chunk(progress.index, "", False, none, new.finish, made)

    def _chunk(
        self, index: int, text: str, first: bool, logprobs: Any, finish: str | None, made: dict[str, Any]
    ) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        said = {"delta": role | {"content": text}} if self.chat else {"text": text}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return self._head(self._piece) | {"choices": [choice]} | made

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

    def _logprobs(self, index: int, new: Reply) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        spelling = self.spellings.setdefault(index, Spelling(self.tokenizer))
        tops = new.tops or [()] * len(new.tokens)
        spelled = [spelling.add(token, [one for one, _ in top]) for token, top in zip(new.tokens, tops, strict=True)]
        if new.finish and spelled:
            spelling.end(spelled[-1][0])
        if not self.chat:
            return {
                "tokens": [token.text for token, _ in spelled],
                "token_logprobs": [_finite(value) for value in new.logprobs],
                "top_logprobs": [_by_text(others, top) for (_, others), top in zip(spelled, tops, strict=True)],
                "text_offset": [token.offset for token, _ in spelled],
            }
        listed = [
            _entry(token, value) | {"top_logprobs": [_entry(one, of) for one, (_, of) in zip(others, top, strict=True)]}
            for (token, others), value, top in zip(spelled, new.logprobs, tops, strict=True)
        ]
        return {"content": listed, "refusal": None}


def _entry(token: Spelled, value: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(value), "bytes": None if token.raw is None else [*token.raw]}


def _by_text(tokens: Sequence[Spelled], top: TopLogprobs) -> dict[str, float]:
    """By their texts; a token whose text stands there already by its number, as no other may take its place."""
    found: dict[str, float] = {}
    for token, (number, value) in zip(tokens, top, strict=True):
        found[f"token_id:{number}" if token.text in found else token.text] = _finite(value)
    return found


def named(digests: Mapping[str, str]) -> dict[str, str]:
    """The header that names the adapters of an answer."""
    listed = ", ".join(f"{quote(name, safe='')}=sha256:{digest}" for name, digest in digests.items())
    return {"x-gossamer-adapter": listed or "none"}


def _finite(value: float) -> float:
    return max(value, LEAST_LOGPROB)
