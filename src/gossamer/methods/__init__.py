"""The methods, one short file each; registering one makes it inherit every law in tests/laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.errors import SpecError, nearest
from gossamer.methods.base import Base, BiasShift, Layer, Replacement, Shape, TargetedMethod
from gossamer.methods.lora import LoRA, LoRALayer
from gossamer.spec import Lines

METHODS: dict[str, type[TargetedMethod]] = {method.name: method for method in (LoRA,)}


def method_from_dict(fields: Mapping[str, Any], *, where: str = "method", lines: Lines | None = None) -> TargetedMethod:
    """The spec that a plain mapping with a "name" describes; `lines` is seen from inside that mapping.

    Raises `SpecError` with the nearest names.
    """
    name = fields.get("name", "lora")
    if name not in METHODS:
        place = f"{lines.at(('name',))}: " if lines else ""
        raise SpecError(
            f"{place}unknown method", got=repr(name), expected=", ".join(METHODS), hint=nearest(str(name), METHODS)
        )
    return METHODS[name].from_dict(
        {key: value for key, value in fields.items() if key != "name"}, where=where, lines=lines
    )


__all__ = [
    "METHODS",
    "Base",
    "BiasShift",
    "Layer",
    "LoRA",
    "LoRALayer",
    "Replacement",
    "Shape",
    "TargetedMethod",
    "method_from_dict",
]
