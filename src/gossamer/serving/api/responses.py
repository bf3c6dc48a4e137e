"""Responses: /openapi.json promises these types, and every answer is an instance of one, validated when made.

OpenAI's shapes, and `gossamer` beside their fields. A field that is not given to an instance is left out of the JSON.
"""
# ruff: noqa: UP013  (what answers are made of stands here as a table, a line a shape)

from collections.abc import Mapping
from typing import Any, Generic, Literal, NotRequired, TypeVar

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict  # pydantic reads that of typing from Python 3.12 on

from gossamer.serving.sampling import FinishReason

Kind = TypeVar("Kind")
ChoiceKind = TypeVar("ChoiceKind")


class ResponseBody(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    def json_bytes(self) -> bytes:
        """As it is sent."""
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)

    @property
    def event(self) -> bytes:
        """As one server-sent event."""
        return b"data: %b\n\n" % self.json_bytes

    def response(self, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """As a whole answer."""
        return Response(self.json_bytes, status, headers, "application/json")


# What answers are made of -------------------------------------------------------------------------------------------

ErrorDetail = TypedDict("ErrorDetail", {"message": str, "type": str, "param": str | None, "code": str})
"""What went wrong: in words, and as a stable word for programs."""

AdapterUse = TypedDict("AdapterUse", {"id": str, "scale": float, "digest": str})
"""An adapter that made an answer, and the digest of its value."""

AdapterUses = TypedDict("AdapterUses", {"adapters": list[AdapterUse]})
"""All that did; none for the base alone."""

AdapterState = TypedDict(
    "AdapterState",
    {
        "digest": str | None,
        "rank": int | None,
        "method": str | None,
        "state": Literal["disk", "memory", "in use"],
        "requests": int,
        "bytes": int | None,
        "revision": NotRequired[str],
    },
)
"""What is known of an adapter: digest, rank, method and bytes once it was read; of the hub's also the commit."""

CachedTokens = TypedDict("CachedTokens", {"cached_tokens": int})
"""Tokens of a prompt that were not read again."""

CompletionUsage = TypedDict(
    "CompletionUsage",
    {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int, "prompt_tokens_details": CachedTokens},
)
EmbeddingUsage = TypedDict("EmbeddingUsage", {"prompt_tokens": int, "total_tokens": int})

AssistantMessage = TypedDict("AssistantMessage", {"role": Literal["assistant"], "content": str})
MessageDelta = TypedDict("MessageDelta", {"role": NotRequired[Literal["assistant"]], "content": str})
"""What is new of the assistant's turn; its first has the role."""

TopLogprob = TypedDict("TopLogprob", {"token": str, "logprob": float, "bytes": list[int] | None})
"""A token that was likely in a place."""

TokenLogprob = TypedDict(
    "TokenLogprob", {"token": str, "logprob": float, "bytes": list[int] | None, "top_logprobs": list[TopLogprob]}
)
"""A token that was drawn, and the likeliest ones in its place."""

ChatLogprobs = TypedDict("ChatLogprobs", {"content": list[TokenLogprob], "refusal": None})
TextLogprobs = TypedDict(
    "TextLogprobs",
    {
        "tokens": list[str],
        "token_logprobs": list[float],
        "top_logprobs": list[dict[str, float]],
        "text_offset": list[int],
    },
)

ChatChoice = TypedDict(
    "ChatChoice",
    {"index": int, "message": AssistantMessage, "logprobs": ChatLogprobs | None, "finish_reason": FinishReason},
)
"""One of the sequences of a chat."""

ChatChunkChoice = TypedDict(
    "ChatChunkChoice",
    {"index": int, "delta": MessageDelta, "logprobs": ChatLogprobs | None, "finish_reason": FinishReason | None},
)
TextChoice = TypedDict(
    "TextChoice", {"index": int, "text": str, "logprobs": TextLogprobs | None, "finish_reason": FinishReason}
)
"""One of the sequences of a plain completion."""

TextChunkChoice = TypedDict(
    "TextChunkChoice",
    {"index": int, "text": str, "logprobs": TextLogprobs | None, "finish_reason": FinishReason | None},
)
EmbeddingItem = TypedDict(
    "EmbeddingItem", {"object": Literal["embedding"], "index": int, "embedding": list[float] | str}
)
"""Of one text: numbers, or float32 in base64."""

# Answers -----------------------------------------------------------------------------------------------------------


class ErrorResponse(ResponseBody):
    """Every answer that is no success."""

    error: ErrorDetail


class StatusResponse(ResponseBody):
    """/health and /ready."""

    status: Literal["ok"]


class AdapterChangeResponse(ResponseBody):
    """A name was given another meaning, or none; whether it still has it after a restart."""

    status: Literal["ok"]
    id: str
    digest: str | None = None
    kept: bool


class VersionResponse(ResponseBody):
    """/version."""

    version: str


class TokenizeResponse(ResponseBody):
    """/tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(ResponseBody):
    """/detokenize."""

    prompt: str


class ModelCard(ResponseBody):
    """A base, or an adapter of one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | None
    parent: str | None
    gossamer: AdapterState | None = None


class ModelList(ResponseBody):
    """/v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class CompletionOf(ResponseBody, Generic[Kind, ChoiceKind]):
    """What both kinds of completions have in common."""

    id: str
    object: Kind
    created: int
    model: str
    choices: list[ChoiceKind]
    usage: CompletionUsage
    gossamer: AdapterUses


class ChunkOf(ResponseBody, Generic[Kind, ChoiceKind]):
    """What the chunks of both have in common: the first and the last of a sequence name the adapters."""

    id: str
    object: Kind
    created: int
    model: str
    choices: list[ChoiceKind]
    usage: CompletionUsage | None = None
    gossamer: AdapterUses | None = None


class ChatCompletion(CompletionOf[Literal["chat.completion"], ChatChoice]):
    """/v1/chat/completions."""


class ChatCompletionChunk(ChunkOf[Literal["chat.completion.chunk"], ChatChunkChoice]):
    """A piece of its stream."""


class TextCompletion(CompletionOf[Literal["text_completion"], TextChoice]):
    """/v1/completions."""


class TextCompletionChunk(ChunkOf[Literal["text_completion"], TextChunkChoice]):
    """A piece of its stream."""


class EmbeddingList(ResponseBody):
    """/v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingItem]
    usage: EmbeddingUsage
    gossamer: AdapterUses


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What was asked cannot be had, or not now (Retry-After)"},
    "5XX": {"model": ErrorResponse, "description": "The server cannot answer"},
}
"""What every route answers besides, for /openapi.json."""
_ERROR_SCHEMA = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
ERRORS_OF_TEXTS: dict[int | str, dict[str, Any]] = {
    status: {"description": about["description"], "content": _ERROR_SCHEMA} for status, about in ERRORS.items()
}
"""The same where success is no JSON."""
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
"""A completion comes in one piece, or as events."""
