"""What may be asked, field by field, each within bounds. A field that is not here is refused, never ignored.

What need not be given may be null as well, which clients write for what is not set; but a weight in a mix is a number.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from gossamer.serving.api.fields import (
    MOST_IDS,
    Asked,
    Digits,
    Flag,
    Ids,
    Integer,
    Name,
    Note,
    Number,
    Stop,
    Text,
    TokenId,
    all_whole,
)
from gossamer.serving.api.openais import IdleChat, IdleCompletion, IdleMessage
from gossamer.serving.sampling import Sampling

MOST_PROMPTS = 64
MOST_SEQUENCES = 128
"""Of one request: prompts times `n`."""


def several(given: Any) -> list[Any]:
    """Texts or lists of token ids, of what may be one of them or several."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else [*given]


class Weighted(Asked):
    """One adapter of a mix."""

    id: Name
    scale: Annotated[Number, Field(ge=-100, le=100)] = 1.0


class StreamOptions(Asked):
    """What a stream tells besides its text: the usage after all, or in every piece as far as it came."""

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(Asked):
    """A JSON schema that the answer shall satisfy."""

    name: Name | None = None
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Flag | None = None


class ResponseFormat(Asked):
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


class Generation(Asked):
    """What chat and plain completions have in common."""

    model: Name
    lora: Annotated[list[Weighted], Field(max_length=8)] | None = None
    n: Annotated[Integer, Field(ge=1, le=16)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Integer, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=1_000_000)] | None = None
    """-1 leaves all, as 0 does."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=2)] | None = None
    logit_bias: Annotated[dict[Digits, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    seed: Annotated[Integer, Field(ge=-1, lt=2**63)] | None = None
    """-1 for a fresh one."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    ignore_eos: Flag | None = None
    response_format: ResponseFormat | None = None
    user: Note | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    def tops(self) -> int:
        """How many of the likeliest tokens are wanted at each place."""
        raise NotImplementedError

    @property
    def wants_logprobs(self) -> bool:
        """Whether the tokens' own logarithms are wanted."""
        raise NotImplementedError

    def sampling(self, max_tokens: int, number: int) -> Sampling:
        """For sequence `number` of a request. A seed gives each its own numbers. Raises `UsageError`."""
        given = {
            name: value
            for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.logit_bias:
            given["logit_bias"] = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        if self.response_format and (schema := self.response_format.schema_text):
            given["schema"] = schema
        if self.tops:
            given["top_logprobs"] = self.tops
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=None if self.seed is None or self.seed < 0 else (self.seed + number) % 2**63,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            **given,
        )


class TextPart(Asked):
    """A part of a message: text is all that these models read."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind in _PARTS:
            raise ValueError(f"{_PARTS[kind]} not read: parts are of the type 'text'")
        return given


_PARTS = {
    "image_url": "images are",
    "input_image": "images are",
    "image": "images are",
    "input_audio": "sound is",
    "audio": "sound is",
    "video_url": "videos are",
    "file": "files are",
    "refusal": "refusals are",
}


class Message(IdleMessage):
    """Who said what. A name is for chat templates that write it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Name | None = None

    def plain(self, named: bool = True) -> dict[str, str]:
        """As chat templates want it, with its name if it has one."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if named and self.name else {})


class Templated(Asked):
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
    def _one_end(self) -> Templated:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("give add_generation_prompt or continue_final_message")
        return self


class Chat(Generation, Templated, IdleChat):
    """/v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[Integer, Field(ge=1, le=1_000_000)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Chat:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens")
        return self

    @property
    def tops(self) -> int:
        return self.top_logprobs or 0

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


class Completion(Generation, IdleCompletion):
    """/v1/completions"""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    add_special_tokens: Flag | None = None
    """Whether the tokenizer puts around a text what it puts around texts; so where it is not given."""

    @model_validator(mode="after")
    def _not_too_many(self) -> Completion:
        if self.best_of and (self.n or 1) > 1:
            raise ValueError("best_of is n at least")
        if len(self.prompts) * (self.n or 1) > MOST_SEQUENCES:
            raise ValueError(f"at most {MOST_SEQUENCES} sequences: prompts times n")
        return self

    @property
    def prompts(self) -> list[Any]:
        """One or several, as texts or token ids."""
        return several(self.prompt)

    @property
    def tops(self) -> int:
        return self.logprobs or 0

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class Embedding(Asked):
    """/v1/embeddings"""

    model: Name
    input: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Annotated[list[Ids], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Integer, Field(ge=1, le=65_536)] | None = None
    user: Note | None = None

    @property
    def texts(self) -> list[Any]:
        """One or several, as texts or token ids."""
        return several(self.input)

    @property
    def most(self) -> int:
        """Tokens at most: no token is shorter than a byte; two are added around a text."""
        return sum(len(one.encode() if isinstance(one, str) else one) + 2 for one in self.texts)


class Load(Asked):
    """/v1/load_lora_adapter"""

    lora_name: Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    lora_path: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1024)]
    load_inplace: Flag | None = None


class Unload(Asked):
    """/v1/unload_lora_adapter"""

    lora_name: Name


class Tokenize(Templated):
    """/tokenize"""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)] | None = None
    add_special_tokens: Flag | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Tokenize:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        if self.messages is None and self.model_fields_set & Templated.model_fields.keys():
            raise ValueError("how a chat template writes goes with messages")
        return self


class Detokenize(Asked):
    """/detokenize"""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MOST_IDS), BeforeValidator(all_whole)]
