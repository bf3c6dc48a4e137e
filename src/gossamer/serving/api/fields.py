"""Kinds of fields of what is asked: strict, but a whole number may be written with a point, as JSON schema has it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

MOST_TEXT = 2_000_000
MOST_IDS = 262_144


_WHOLE = {
    "n",
    "max_tokens",
    "max_completion_tokens",
    "top_k",
    "seed",
    "logprobs",
    "top_logprobs",
    "dimensions",
    "best_of",
}
"""Fields that are integers: a validator of each would hide their bounds from /openapi.json."""


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def all_whole(value: Any) -> Any:
    """A list with its whole numbers as integers; anything else as it is."""
    return [_whole(one) for one in value] if type(value) is list else value


Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Text = Annotated[str, StringConstraints(strict=True, max_length=MOST_TEXT)]
Note = Annotated[str, StringConstraints(strict=True, max_length=256)]
Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_IDS), BeforeValidator(all_whole)]
Flag = Annotated[bool, Field(strict=True)]
Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Digits = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]


class Asked(BaseModel):
    """Base of all that is asked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: _whole(value) if name in _WHOLE else value for name, value in given.items()}
