"""Kinds of fields of what is asked: strict, but a whole number may be written with a point, as JSON schema has it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MOST_TEXT = 2_000_000
MOST_IDS = 262_144


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def all_whole(value: Any) -> Any:
    """A list with its whole numbers as integers; anything else as it is."""
    return [_whole(one) for one in value] if type(value) is list else value


Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Text = Annotated[str, StringConstraints(strict=True, max_length=MOST_TEXT)]
Note = Annotated[str, StringConstraints(strict=True, max_length=256)]
Integer = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Number = Annotated[float, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_IDS), BeforeValidator(all_whole)]
Flag = Annotated[bool, Field(strict=True)]
Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
Digits = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]


class Asked(BaseModel):
    """Base of all that is asked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
