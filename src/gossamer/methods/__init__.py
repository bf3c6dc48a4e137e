"""The methods, one short file each; registering one makes it inherit every law in tests/laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.errors import SpecError, nearest
from gossamer.methods.base import Base, Layer, Replacement, Shape, TargetedMethod
from gossamer.methods.lora import LoRA, LoRALayer
from gossamer.spec import Lines

METHODS: dict[str, type[TargetedMethod]] = {method.name: method for method in (LoRA,)}


def method_from_dict(
    fields: Mapping[str, Any], *, where: str = "method", lines: Lines | None = None, at: tuple[str, ...] = ()
) -> TargetedMethod:
    """The spec that a plain mapping with a "name" describes; the other arguments are `Spec.from_dict`'s.

    Raises `SpecError` with every fault and the nearest names.
    """
    name = fields.get("name", LoRA.name)
    if name not in METHODS:
        place = f"{lines.at((*at, 'name'))}: " if lines else ""
        hint = nearest(str(name), METHODS)
        fault = f"{place}{'.'.join((*at, 'name'))}: unknown method; got {name!r}, expected {', '.join(METHODS)}"
        raise SpecError(f"{where} is not valid", faults=[f"{fault}; {hint}" if hint else fault])
    rest = {key: value for key, value in fields.items() if key != "name"}
    return METHODS[name].from_dict(rest, where=where, lines=lines, at=at)


__all__ = [
    "METHODS",
    "Base",
    "Layer",
    "LoRA",
    "LoRALayer",
    "Replacement",
    "Shape",
    "TargetedMethod",
    "method_from_dict",
]
