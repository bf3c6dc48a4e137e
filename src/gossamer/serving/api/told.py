"""What is answered, field by field, as /openapi.json tells it: OpenAI's shapes, and `gossamer` beside their fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Told(BaseModel):
    """Base of all that is told."""

    model_config = ConfigDict(extra="forbid")


class Fault(Told):
    """What went wrong: in words, and as a stable word for programs."""

    message: str
    type: str
    param: str | None
    code: str


class Faults(Told):
    """Every answer that is no success."""

    error: Fault


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Faults, "description": "What was asked cannot be had, or not now (Retry-After)"},
    "5XX": {"model": Faults, "description": "The server cannot answer"},
}
ERRORS_OF_TEXTS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": about["description"],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Faults"}}},
    }
    for status, about in ERRORS.items()
}
"""The same where success is no JSON."""
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
"""A completion comes in one piece, or as events."""


class Status(Told):
    """That it was done, or is so."""

    status: Literal["ok"]


class Changed(Status):
    """A name was given another meaning, or none; whether it still has it after a restart."""

    id: str
    digest: str | None = None
    kept: bool


class Version(Told):
    """/version"""

    version: str


class Tokens(Told):
    """/tokenize"""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Told):
    """/detokenize"""

    prompt: str


class Made(Told):
    """An adapter that made an answer, and the digest of its value."""

    id: str
    scale: float
    digest: str


class MadeBy(Told):
    """All that did; none for the base alone."""

    adapters: list[Made]


class About(Told):
    """What is known of an adapter; digest, rank, method and bytes once it was read."""

    digest: str | None
    rank: int | None
    method: str | None
    state: Literal["disk", "memory", "in use"]
    requests: int
    bytes: int | None
    revision: str | None = None
    """The commit of the hub that its name stands for."""


class Model(Told):
    """A base, or an adapter of one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | None
    parent: str | None
    gossamer: About | None = None


class Models(Told):
    """/v1/models"""

    object: Literal["list"]
    data: list[Model]


class Cached(Told):
    """Tokens that were not read again."""

    cached_tokens: int


class Usage(Told):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class Spoken(Told):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str


class Likely(Told):
    """A token that was likely in a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class Drawn(Likely):
    """A token that was drawn, and the likeliest ones in its place."""

    top_logprobs: list[Likely]


class ChatLogprobs(Told):
    """Of a chat's tokens."""

    content: list[Drawn]
    refusal: None


class TextLogprobs(Told):
    """Of a plain completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(Told):
    """One of the sequences that were asked for."""

    index: int
    finish_reason: Literal["stop", "length"]


class ChatChoice(Choice):
    """One of a chat."""

    message: Spoken
    logprobs: ChatLogprobs | None


class TextChoice(Choice):
    """One of a plain completion."""

    text: str
    logprobs: TextLogprobs | None


class Completed(Told):
    """What both kinds of completions have in common."""

    id: str
    created: int
    model: str
    usage: Usage
    gossamer: MadeBy


class ChatCompletion(Completed):
    """/v1/chat/completions"""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(Completed):
    """/v1/completions"""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Vector(Told):
    """Of one text: numbers, or float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Read(Told):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Told):
    """/v1/embeddings"""

    object: Literal["list"]
    model: str
    data: list[Vector]
    usage: Read
    gossamer: MadeBy
