"""The methods, one short file each; registering one makes it inherit every law in tests/laws."""

from collections.abc import Mapping
from typing import Any

from gossamer.errors import SpecError, nearest
from gossamer.methods.base import Base, Layer, Shape
from gossamer.methods.bottleneck import Houlsby, Lin
from gossamer.methods.dora import DoRA
from gossamer.methods.ia3 import IA3
from gossamer.methods.lora import LoRA
from gossamer.methods.prefix import PrefixTuning, PromptTuning
from gossamer.methods.replacement import ParameterLayer, Replacement
from gossamer.methods.targeted import TargetedMethod
from gossamer.methods.vera import VeRA
from gossamer.methods.whole import BitFit, FullTuning, NormTuning
from gossamer.spec import Lines

METHODS: dict[str, type[TargetedMethod]] = {
    method.name: method
    for method in (LoRA, DoRA, VeRA, IA3, BitFit, NormTuning, Houlsby, Lin, PrefixTuning, PromptTuning, FullTuning)
}


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
    "BitFit",
    "DoRA",
    "FullTuning",
    "Houlsby",
    "IA3",
    "Layer",
    "Lin",
    "LoRA",
    "NormTuning",
    "ParameterLayer",
    "PrefixTuning",
    "PromptTuning",
    "Replacement",
    "Shape",
    "TargetedMethod",
    "VeRA",
    "method_from_dict",
]
