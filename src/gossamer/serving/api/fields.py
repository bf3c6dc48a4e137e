"""Kinds of fields that requests have, and OpenAI's own fields that nothing here honours.

The latter are taken at the values that ask for nothing, which clients write out, and else refused with the reason that
stands beside them. A test holds them and those that are honoured against the parameters of the package `openai`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MOST_TEXT = 2_000_000
MOST_IDS = 262_144


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def all_whole(value: Any) -> Any:
    """A list with its whole numbers as integers; anything else as it is."""
    return [_whole(one) for one in value] if type(value) is list else value


WHOLE = BeforeValidator(_whole)
"""A whole number may be written with a point, as JSON schema has it. Stands behind the bounds, or hides them."""
Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Note = Annotated[str, StringConstraints(strict=True, max_length=256)]
Text = Annotated[str, StringConstraints(strict=True, max_length=MOST_TEXT)]
StopText = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Digits = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_IDS), BeforeValidator(all_whole)]
NewTokens = Annotated[int, Field(strict=True, ge=1, le=1_000_000), WHOLE]
Likeliest = Annotated[int, Field(strict=True, ge=0, le=20), WHOLE]
EmptyList = Annotated[list[Any], Field(max_length=0)]


class RequestBody(BaseModel):
    """Base of all that may be asked."""

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
        "every sequence that is drawn is told; ask for n"
    )
    echo: Literal[False] | None = unsupported("prompts are neither told again nor scored")
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
