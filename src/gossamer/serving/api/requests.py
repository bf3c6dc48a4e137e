"""What may be asked, field by field, each within bounds. A field that is not here is refused, never ignored.

A field that is not required may be null as well, which clients write for what is not set; but a weight in a mix is a
number.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from gossamer.serving.api.fields import (
    MOST_IDS,
    WHOLE,
    Digits,
    Flag,
    Likeliest,
    Name,
    NewTokens,
    Note,
    Number,
    RequestBody,
    StopText,
    Text,
    TokenId,
    TokenIds,
    UnsupportedOfChats,
    UnsupportedOfCompletions,
    UnsupportedOfMessages,
    all_whole,
)
from gossamer.serving.sampling import Sampling

MOST_PROMPTS = 64
MOST_SEQUENCES = 128
"""Of one request: prompts times `n`."""


class WeightedAdapter(RequestBody):
    """One adapter of a mix."""

    id: Name
    scale: Annotated[Number, Field(ge=-100, le=100)] = 1.0


class StreamOptions(RequestBody):
    """What a stream tells besides its text: the usage at the end, or in every chunk as far as it came."""

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(RequestBody):
    """A JSON schema that the answer shall satisfy."""

    name: Name | None = None
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Flag | None = None


class ResponseFormat(RequestBody):
    """What kind of text is wanted."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self

    @property
    def schema_text(self) -> str | None:
        """As `Sampling.schema` takes it."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_, sort_keys=True, separators=(",", ":"))
        return "json" if self.type == "json_object" else None


class GenerationRequest(RequestBody):
    """What chat and plain completions have in common."""

    model: Name
    lora: Annotated[list[WeightedAdapter], Field(max_length=8)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=16), WHOLE] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: NewTokens | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, le=1_000_000), WHOLE] | None = None
    """-1 leaves all, as 0 does."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=2)] | None = None
    logit_bias: Annotated[dict[Digits, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-1, lt=2**63), WHOLE] | None = None
    """-1 for a fresh one."""
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: Flag | None = None
    response_format: ResponseFormat | None = None
    user: Note | None = None

    most_by_default: ClassVar[int | None]
    """Tokens of an answer where the request does not say how many; None for as many as the context has room for."""

    @model_validator(mode="after")
    def _options_of_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    @abstractmethod
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are wanted at each place; None where no logarithms are."""

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """How many tokens an answer may have, where it is said."""

    def sampling(self, max_tokens: int, number: int) -> Sampling:
        """For sequence `number` of a request. A seed gives each its own numbers. Raises `UsageError`."""
        same = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        given = {name: value for name in same if (value := getattr(self, name)) is not None}
        return Sampling(
            **{"temperature": 1.0} | given,
            max_tokens=max_tokens,
            top_k=max(self.top_k or 0, 0),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=None if self.seed is None or self.seed < 0 else (self.seed + number) % 2**63,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=self.likeliest or 0,
            schema=self.response_format.schema_text if self.response_format else None,
        )


_UNREAD = {"image": "images are", "audio": "sound is", "video": "videos are", "file": "files are"}
_UNREAD["refusal"] = "refusals are"


class TextPart(RequestBody):
    """A part of a message: text is all that these models read."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and (what := _UNREAD.get(kind.removeprefix("input_").removesuffix("_url"))):
            raise ValueError(f"{what} not read: parts are of the type 'text'")
        return given


class ChatMessage(UnsupportedOfMessages):
    """Who said what. A name is for chat templates that write it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Name | None = None

    def plain(self, named: bool = True) -> dict[str, str]:
        """As chat templates want it, with its name if it has one."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if named and self.name else {})


class TemplateOptions(RequestBody):
    """How a chat template writes a conversation.

    Attributes:
        add_generation_prompt: begin the assistant's turn; so where it is not given, unless the last goes on.
        continue_final_message: go on with the last message, the assistant's, instead of closing it.
        chat_template_kwargs: the template's own variables, such as enable_thinking.
    """

    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _one_end(self) -> TemplateOptions:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("give add_generation_prompt or continue_final_message")
        return self


class ChatRequest(GenerationRequest, TemplateOptions, UnsupportedOfChats):
    """/v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    max_completion_tokens: NewTokens | None = None
    logprobs: Flag | None = None
    top_logprobs: Likeliest | None = None

    most_by_default = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens")
        return self

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def _several(given: Any) -> list[Any]:
    """Texts or lists of token ids, of what may be one of them or several."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else [*given]


class CompletionRequest(GenerationRequest, UnsupportedOfCompletions):
    """/v1/completions"""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Likeliest | None = None
    add_special_tokens: Flag | None = None
    """Whether the tokenizer puts around a text what it puts around texts; so where it is not given."""

    most_by_default = 16

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if self.best_of and (self.n or 1) > 1:
            raise ValueError("best_of is n at least")
        if len(self.prompts) * (self.n or 1) > MOST_SEQUENCES:
            raise ValueError(f"at most {MOST_SEQUENCES} sequences: prompts times n")
        return self

    @property
    def prompts(self) -> list[Any]:
        """One or several, as texts or token ids."""
        return _several(self.prompt)

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return self.max_tokens


class EmbeddingRequest(RequestBody):
    """/v1/embeddings"""

    model: Name
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(strict=True, ge=1, le=65_536), WHOLE] | None = None
    user: Note | None = None

    @property
    def texts(self) -> list[Any]:
        """One or several, as texts or token ids."""
        return _several(self.input)

    @property
    def most(self) -> int:
        """Tokens at most: no token is shorter than a byte; two are added around a text."""
        return sum(len(one.encode() if isinstance(one, str) else one) + 2 for one in self.texts)


class LoadAdapterRequest(RequestBody):
    """/v1/load_lora_adapter"""

    lora_name: Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    lora_path: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1024)]
    load_inplace: Flag | None = None


class UnloadAdapterRequest(RequestBody):
    """/v1/unload_lora_adapter"""

    lora_name: Name


class TokenizeRequest(TemplateOptions):
    """/tokenize"""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)] | None = None
    add_special_tokens: Flag | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        if self.messages is None and self.model_fields_set & TemplateOptions.model_fields.keys():
            raise ValueError("how a chat template writes goes with messages")
        return self


class DetokenizeRequest(RequestBody):
    """/detokenize"""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MOST_IDS), BeforeValidator(all_whole)]
