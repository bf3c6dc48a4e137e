"""From a request to the tokens of a prompt: as the chat template writes it, and no longer than the context."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from gossamer.errors import UsageError
from gossamer.serving.api.faults import Refusal
from gossamer.serving.api.requests import ChatMessage, TemplateOptions
from gossamer.serving.chat_format import ChatFormat
from gossamer.serving.vocabulary import encoded

_LETTERS = 16
"""Of a token, as a first guess: so many times the context are encoded before it is looked whether more is needed."""
_SEAM = 64
"""Tokens that the beginning of a text may have more than it has within the whole: where it was cut."""


def rendered(tokenizer: Any, messages: Sequence[ChatMessage], how: TemplateOptions, chat_format: ChatFormat) -> str:
    """A conversation as the adapters' own chat template writes it, or the base's.

    Raises `UsageError` where it cannot, or leaves something out.
    """
    template = chat_format.template or tokenizer.chat_template
    if not template:
        raise UsageError("this base has no chat template", hint="use /v1/completions")
    variables = how.chat_template_kwargs or {}
    _check_variables(tokenizer, template, variables)
    goes_on = bool(how.continue_final_message)
    if goes_on and messages[-1].role != "assistant":
        raise UsageError("the last message is not the assistant's", where="continue_final_message")
    begins = not goes_on if how.add_generation_prompt is None else how.add_generation_prompt
    options: Any = {**chat_format.tokens, **variables, "chat_template": chat_format.template}
    options |= {"add_generation_prompt": begins, "continue_final_message": goes_on}
    text = _written(tokenizer, [one.plain() for one in messages], options)
    if any(one.name for one in messages):
        for number, named in enumerate(messages):
            others = [one.plain(named=place != number) for place, one in enumerate(messages)]
            if named.name and _written(tokenizer, others, options) == text:
                what, hint = "the chat template of this model does not write names", "say in the content who speaks"
                raise UsageError(what, where=f"messages.{number}.name", hint=hint)
    return text


def _written(tokenizer: Any, turns: list[dict[str, str]], options: Mapping[str, Any]) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        said = str(error)[:300] if isinstance(error, TemplateError) else ""  # a template's own rules, as of turns
        got = said or type(error).__name__
        raise UsageError("the chat template refuses these messages", where="messages", got=got) from None


def _check_variables(tokenizer: Any, template: Any, variables: Mapping[str, Any]) -> None:
    """Only what the template itself reads: what it does not would be ignored, and the rest is the tokenizer's."""
    text = template if isinstance(template, str) else " ".join(map(str, template.values()))
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", *tokenizer.special_tokens_map}
    for name in variables:
        if not name.isidentifier() or name in own or not re.search(rf"\b{re.escape(name)}\b", text):
            raise UsageError("the chat template has no such variable", where="chat_template_kwargs", got=name[:64])


def within(tokenizer: Any, text: str, special: bool, context: int | None) -> tuple[int, ...]:
    """Token ids of a text; one far over the context, if there is one, is refused by its beginning. Raises `Refusal`."""
    size = context * _LETTERS if context else len(text)
    while context and size < len(text):
        least = len(encoded(tokenizer, text[:size], special)) - _SEAM
        if least >= context:
            raise too_long(f"at least {least:,}", context)
        size *= 2
    return encoded(tokenizer, text, special)


def too_long(tokens: str, context: int) -> Refusal:
    """Of a prompt that leaves no room for an answer."""
    message = f"A prompt has 1 to {context - 1:,} tokens here; this one has {tokens}."
    return Refusal(400, message, "context_length_exceeded", param="messages or prompt")
