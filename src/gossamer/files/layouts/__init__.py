"""Which table a config or a spec is read and written by; `reading` and `writing` do what the tables say."""

from collections.abc import Mapping
from typing import Any

from gossamer.errors import UnsupportedError, nearest
from gossamer.methods import METHODS, TargetedMethod
from gossamer.methods.peft import PeftLayout

OWN = "GOSSAMER_"
"""How a type of ours begins, which PEFT refuses by name; the spec is then in `gossamer.json` alone."""


def layout_of(config: Mapping[str, Any], where: str) -> PeftLayout:
    """The layout that a config names. Raises `UnsupportedError` with the type and those that are covered."""
    kind = config.get("peft_type")
    found = [layout for layout in _tables() if layout.peft_type == kind]
    for layout in found:
        if all(config.get(key, layout.keys[key].default) == value for key, value in layout.given.items()):
            return layout
    if found:
        return found[0]
    name = next((name for name in METHODS if kind == own_type(name)), None)
    if name:
        return PeftLayout(own_type(name), complete=False)
    known = [*dict.fromkeys(layout.peft_type for layout in _tables())]
    raise UnsupportedError(
        "this PEFT method is not covered",
        where=where,
        got=f"peft_type={kind!r}",
        expected=", ".join(known),
        hint=nearest(str(kind), known),
    )


def layout_for(spec: TargetedMethod) -> PeftLayout:
    """The layout that an adapter is written in: PEFT's where PEFT can say what the spec says."""
    layout: PeftLayout | None = vars(type(spec)).get("peft")
    if layout is not None:
        tokens = not spec.trainable_tokens or "trainable_token_indices" in layout.keys
        default = type(spec).model_fields["target_modules"].default
        if tokens and ("target_modules" in layout.targeting or spec.target_modules == default):
            return layout
    return PeftLayout(own_type(spec.name), complete=False)


def own_type(name: str) -> str:
    """The type of ours for a method."""
    return OWN + name.upper()


def _tables() -> list[PeftLayout]:
    """Those of the methods that PEFT has too."""
    return [layout for method in METHODS.values() if (layout := vars(method).get("peft")) is not None]


__all__ = ["OWN", "layout_for", "layout_of"]
