"""OpenAI's own fields that nothing here honours: taken at the values that ask for nothing, else refused by name.

Clients write such fields out with their defaults. A test holds this table, with the fields that are honoured, against
the parameters of the package `openai`: one that it adds is to be put somewhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from gossamer.serving.api.fields import Asked, Flag, Integer, Note

Nothing = Annotated[list[Any], Field(max_length=0)]
"""A list of none."""

UNSUPPORTED = {
    "audio": "answers are texts",
    "best_of": "every sequence that is drawn is told; ask for n",
    "echo": "prompts are neither told again nor scored",
    "function_call": "functions are not called here",
    "functions": "functions are not called here",
    "metadata": "nothing is kept of a request, so nothing can be noted beside it",
    "modalities": "answers are texts",
    "moderation": "nothing is moderated here",
    "prediction": "there is no speculation on what an answer will be",
    "prompt_cache_options": "what prompts begin with is reused by itself, and there is nothing to set",
    "prompt_cache_retention": "how long the beginning of a prompt is kept cannot be asked",
    "reasoning_effort": "how a model thinks is its chat template's affair; see chat_template_kwargs",
    "service_tier": "there is one tier",
    "store": "nothing is kept of a request",
    "suffix": "texts are gone on with, not filled in",
    "tool_call_id": "tools are not called here",
    "tool_calls": "tools are not called here",
    "tool_choice": "tools are not called here",
    "tools": "tools are not called here",
    "verbosity": "how long an answer is cannot be asked but by max_tokens",
    "web_search_options": "nothing is searched here",
}
"""Why a field is refused, in words that follow its name."""


class IdleChat(Asked):
    """Of a chat."""

    audio: None = None
    function_call: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    moderation: None = None
    parallel_tool_calls: Flag | None = None
    prediction: None = None
    prompt_cache_key: Note | None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: Literal["none"] | None = None
    safety_identifier: Note | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Nothing | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None


class IdleCompletion(Asked):
    """Of a plain completion."""

    best_of: Annotated[Integer, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None


class IdleMessage(Asked):
    """Of a message: what answers are written out with when they come back as turns."""

    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_call_id: None = None
    tool_calls: Nothing | None = None


def reason(field: str) -> str | None:
    """Why a field is refused, where more is known than that its value is out of bounds; `messages.0.tool_calls` too."""
    name = next((part for part in reversed(field.split(".")) if not part.isdecimal()), "")
    return UNSUPPORTED.get(name)
