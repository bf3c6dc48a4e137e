"""Requests, field by field, each within bounds. A field that is not here is refused, never ignored.

A field that is not required may be null as well, which clients write for what is not set; but a weight in a mix is a
number. OpenAI's own fields that nothing here honours are taken at the values that ask for nothing, which clients write
out, and else refused with the reason beside them; a test holds all of them against the parameters of `openai`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from gossamer.serving.sampling import Sampling

MOST_TEXT = 2_000_000
MOST_IDS = 262_144
MOST_PROMPTS = 64
MOST_SEQUENCES = 128
"""Of one request: prompts times `n`."""


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def _all_whole(value: Any) -> Any:
    return [_whole(one) for one in value] if type(value) is list else value


WHOLE = BeforeValidator(_whole)
"""A whole number may be written with a point, as JSON schema has it. Stands behind the bounds, or hides them."""
Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Note = Annotated[str, StringConstraints(strict=True, max_length=256)]
PromptText = Annotated[str, StringConstraints(strict=True, max_length=MOST_TEXT)]
StopText = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Digits = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_IDS), BeforeValidator(_all_whole)]
NewTokens = Annotated[int, Field(strict=True, ge=1, le=1_000_000), WHOLE]
Likeliest = Annotated[int, Field(strict=True, ge=0, le=20), WHOLE]
EmptyList = Annotated[list[Any], Field(max_length=0)]


class RequestBody(BaseModel):
    """Base of all bodies of requests."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


def unsupported(reason: str) -> Any:
    """A field that is taken where it asks for nothing, and why it is refused where it does not."""
    return Field(None, description=reason)


_TEXTS, _FUNCTIONS, _TOOLS = "answers are texts", "functions are not called here", "tools are not called here"


class UnsupportedOfChats(RequestBody):
    """Of a chat."""

    audio: None = unsupported(_TEXTS)
    function_call: Literal["none", "auto"] | None = unsupported(_FUNCTIONS)
    functions: EmptyList | None = unsupported(_FUNCTIONS)
    metadata: Annotated[dict[str, Any], Field(max_length=0)] | None = unsupported(
        "nothing is kept of a request, so nothing can be noted beside it"
    )
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = unsupported(_TEXTS)
    moderation: None = unsupported("nothing is moderated here")
    parallel_tool_calls: Flag | None = None
    prediction: None = unsupported("there is no speculation on what an answer will be")
    prompt_cache_key: Note | None = None
    prompt_cache_options: None = unsupported("what prompts begin with is reused by itself, and there is nothing to set")
    prompt_cache_retention: None = unsupported("how long the beginning of a prompt is kept cannot be asked")
    reasoning_effort: Literal["none"] | None = unsupported(
        "how a model thinks is its chat template's affair; see chat_template_kwargs"
    )
    safety_identifier: Note | None = None
    service_tier: Literal["auto", "default"] | None = unsupported("there is one tier")
    store: Literal[False] | None = unsupported("nothing is kept of a request")
    tool_choice: Literal["none", "auto"] | None = unsupported(_TOOLS)
    tools: EmptyList | None = unsupported(_TOOLS)
    verbosity: Literal["medium"] | None = unsupported("how long an answer is cannot be asked but by max_tokens")
    web_search_options: None = unsupported("nothing is searched here")


class UnsupportedOfCompletions(RequestBody):
    """Of a plain completion."""

    best_of: Annotated[int, Field(strict=True, ge=1, le=1), WHOLE] | None = unsupported(
        "every sequence that is drawn is returned; ask for n"
    )
    echo: Literal[False] | None = unsupported("prompts are neither repeated nor scored")
    suffix: None = unsupported("texts are gone on with, not filled in")


class UnsupportedOfMessages(RequestBody):
    """Of a message: what answers are written out with when they come back as turns."""

    annotations: EmptyList | None = None
    audio: None = unsupported(_TEXTS)
    function_call: None = unsupported(_FUNCTIONS)
    refusal: None = None
    tool_call_id: None = unsupported(_TOOLS)
    tool_calls: EmptyList | None = unsupported(_TOOLS)


UNSUPPORTED: dict[str, str] = {
    name: field.description
    for model in (UnsupportedOfChats, UnsupportedOfCompletions, UnsupportedOfMessages)
    for name, field in model.model_fields.items()
    if field.description
}
"""Why a field is refused, in words that follow its name."""


def why_unsupported(place: str) -> str | None:
    """Why the field at a place, as `messages.0.tool_calls`, is refused; None where its value is out of bounds."""
    return UNSUPPORTED.get(next((part for part in reversed(place.split(".")) if not part.isdecimal()), ""))


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

    @model_validator(mode="after")
    def _options_of_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    @abstractmethod
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are wanted at each place; None where no logarithms are."""

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
    text: PromptText

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
    content: PromptText | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
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
    """/v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    max_completion_tokens: NewTokens | None = None
    logprobs: Flag | None = None
    top_logprobs: Likeliest | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens")
        self.max_tokens = self.max_tokens or self.max_completion_tokens
        return self

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def several(given: Any) -> list[Any]:
    """Texts or lists of token ids, of what may be one of them or several."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else [*given]


class CompletionRequest(GenerationRequest, UnsupportedOfCompletions):
    """/v1/completions."""

    prompt: (
        PromptText
        | TokenIds
        | Annotated[list[PromptText], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Likeliest | None = None
    add_special_tokens: Flag | None = None
    """Whether the tokenizer puts around a text what it puts around texts; so where it is not given."""

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if self.best_of and (self.n or 1) > 1:
            raise ValueError("best_of is n at least")
        if len(several(self.prompt)) * (self.n or 1) > MOST_SEQUENCES:
            raise ValueError(f"at most {MOST_SEQUENCES} sequences: prompts times n")
        return self

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class EmbeddingRequest(RequestBody):
    """/v1/embeddings."""

    model: Name
    input: (
        PromptText
        | TokenIds
        | Annotated[list[PromptText], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(strict=True, ge=1, le=65_536), WHOLE] | None = None
    user: Note | None = None

    @property
    def most(self) -> int:
        """Tokens at most: no token is shorter than a byte; two are added around a text."""
        return sum(len(one.encode() if isinstance(one, str) else one) + 2 for one in several(self.input))


class LoadAdapterRequest(RequestBody):
    """/v1/load_lora_adapter."""

    lora_name: Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    lora_path: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1024)]
    load_inplace: Flag | None = None


class UnloadAdapterRequest(RequestBody):
    """/v1/unload_lora_adapter."""

    lora_name: Name


class TokenizeRequest(TemplateOptions):
    """/tokenize."""

    model: Name | None = None
    prompt: PromptText | None = None
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
    """/detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MOST_IDS), BeforeValidator(_all_whole)]
