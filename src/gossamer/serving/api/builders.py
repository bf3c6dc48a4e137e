"""From what the engine replies to the responses of chat and plain completions, whole and in chunks."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import quote

from gossamer.serving.api.responses import (
    AdapterUses,
    ChatCompletion,
    ChatCompletionChunk,
    CompletionUsage,
    ResponseBody,
    TextCompletion,
    TextCompletionChunk,
)
from gossamer.serving.detokenizer import Spelled, Spelling
from gossamer.serving.sampling import TopLogprobs
from gossamer.serving.sequence import Reply

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

Places = Sequence[tuple[Spelled, float, list[Spelled], TopLogprobs]]
"""Each sampled token, its logarithm, the likeliest ones in its place, and their numbers and logarithms."""


def adapter_uses(scales: Mapping[str, float], digests: Mapping[str, str]) -> AdapterUses:
    """The adapters that made an answer."""
    return {"adapters": [{"id": name, "scale": scales[name], "digest": digest} for name, digest in digests.items()]}


def adapter_header(digests: Mapping[str, str]) -> dict[str, str]:
    """The same as a header."""
    listed = ", ".join(f"{quote(name, safe='')}=sha256:{digest}" for name, digest in digests.items())
    return {"x-gossamer-adapter": listed or "none"}


class ResponseBuilder(ABC):
    """Builds the responses to one request.

    Args:
        model: as the client named it. scales: adapter -> weight of the request.
        tokenizer: for the texts of tokens. logprobs: whether their logarithms are wanted.
    """

    prefix: ClassVar[str]

    def __init__(self, model: str, scales: Mapping[str, float], tokenizer: Any, logprobs: bool) -> None:
        self.head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}
        self.scales, self.tokenizer, self.logprobs = scales, tokenizer, logprobs
        self.spellings: dict[int, Spelling] = {}
        self.begun: set[int] = set()

    @abstractmethod
    def completion(self, **fields: Any) -> ResponseBody:
        """The whole response, of the fields that both kinds have."""

    @abstractmethod
    def chunk(self, **fields: Any) -> ResponseBody:
        """A chunk of a stream, of the fields that both kinds have."""

    @abstractmethod
    def said(self, text: str, *, first: bool, whole: bool) -> dict[str, Any]:
        """The text of a choice: all of it, or what is new."""

    @abstractmethod
    def logarithms(self, places: Places) -> dict[str, Any]:
        """The logarithms of a choice's tokens."""

    def whole(self, replies: Iterable[Reply], usage: CompletionUsage, digests: Mapping[str, str]) -> ResponseBody:
        """The response in one piece."""
        choices = [self._choice(index, one, one.finish, whole=True) for index, one in enumerate(replies)]
        return self.completion(choices=choices, usage=usage, gossamer=adapter_uses(self.scales, digests))

    def chunks(self, index: int, new: Reply, **usage: Any) -> Iterator[ResponseBody]:
        """What is new of one sequence. That it is finished stands in a chunk of its own, where clients read no text."""
        first = index not in self.begun
        self.begun.add(index)
        uses = {"gossamer": adapter_uses(self.scales, new.digests)} if first or new.finish else {}
        choice = self._choice(index, new, None, first=first)
        if new.tokens or new.text or first:
            yield self.chunk(choices=[choice], **usage, **(uses if first else {}))
        if new.finish:
            yield self.chunk(choices=[self._choice(index, Reply(), new.finish)], **usage, **uses)

    def last(self, usage: CompletionUsage, digests: Mapping[str, str]) -> ResponseBody:
        """The chunk that tells the usage, after all others."""
        return self.chunk(choices=[], usage=usage, gossamer=adapter_uses(self.scales, digests))

    def _choice(
        self, index: int, new: Reply, finish: str | None, *, first: bool = False, whole: bool = False
    ) -> dict[str, Any]:
        said, logprobs = self.said(new.text, first=first, whole=whole), self._logprobs(index, new)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, new: Reply) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        spelling, places = self.spellings.setdefault(index, Spelling(self.tokenizer)), []
        for token, value, top in zip(new.tokens, new.logprobs, new.tops or [()] * len(new.tokens), strict=True):
            spelled, others = spelling.add(token, [number for number, _ in top])
            places.append((spelled, value, others, top))
        if new.finish and places:
            spelling.end(places[-1][0])
        return self.logarithms(places)


class ChatBuilder(ResponseBuilder):
    """Of chat completions."""

    prefix = "chatcmpl-"

    def completion(self, **fields: Any) -> ResponseBody:
        return ChatCompletion(object="chat.completion", **self.head, **fields)

    def chunk(self, **fields: Any) -> ResponseBody:
        return ChatCompletionChunk(object="chat.completion.chunk", **self.head, **fields)

    def said(self, text: str, *, first: bool, whole: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first or whole else {}
        return {"message" if whole else "delta": {**role, "content": text}}

    def logarithms(self, places: Places) -> dict[str, Any]:
        content = [
            _entry(spelled, value)
            | {"top_logprobs": [_entry(one, of) for one, (_, of) in zip(others, top, strict=True)]}
            for spelled, value, others, top in places
        ]
        return {"content": content, "refusal": None}


class TextBuilder(ResponseBuilder):
    """Of plain completions."""

    prefix = "cmpl-"

    def completion(self, **fields: Any) -> ResponseBody:
        return TextCompletion(object="text_completion", **self.head, **fields)

    def chunk(self, **fields: Any) -> ResponseBody:
        return TextCompletionChunk(object="text_completion", **self.head, **fields)

    def said(self, text: str, *, first: bool, whole: bool) -> dict[str, Any]:
        return {"text": text}

    def logarithms(self, places: Places) -> dict[str, Any]:
        return {
            "tokens": [spelled.text for spelled, *_ in places],
            "token_logprobs": [_finite(value) for _, value, *_ in places],
            "top_logprobs": [_by_text(others, top) for *_, others, top in places],
            "text_offset": [spelled.offset for spelled, *_ in places],
        }


def _entry(token: Spelled, value: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(value), "bytes": None if token.raw is None else [*token.raw]}


def _by_text(tokens: Sequence[Spelled], top: TopLogprobs) -> dict[str, float]:
    """By their texts; a token whose text stands there already by its number, as no other may take its place."""
    found: dict[str, float] = {}
    for token, (number, value) in zip(tokens, top, strict=True):
        found[f"token_id:{number}" if token.text in found else token.text] = _finite(value)
    return found


def _finite(value: float) -> float:
    return max(value, LEAST_LOGPROB)
