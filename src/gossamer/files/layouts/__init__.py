"""The layouts: one small file a PEFT type, tensor names and config both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.errors import UnsupportedError, nearest
from gossamer.files.layouts.ia3 import IA3Layout
from gossamer.files.layouts.layout import Layout
from gossamer.files.layouts.lora import LoRALayout
from gossamer.files.layouts.norms import NormLayout
from gossamer.files.layouts.own import OWN, OwnLayout
from gossamer.files.layouts.prompts import PrefixLayout, PromptLayout
from gossamer.files.layouts.vera import VeRALayout
from gossamer.methods import METHODS, TargetedMethod

LAYOUTS: tuple[Layout, ...] = (
    LoRALayout(),
    IA3Layout(),
    VeRALayout(),
    NormLayout(),
    PrefixLayout(),
    PromptLayout(),
)
"""Those that PEFT reads too."""


def layout_of(config: Mapping[str, Any], where: str) -> Layout:
    """The layout that a config names. Raises `UnsupportedError` with the type and those that are covered."""
    kind = config.get("peft_type")
    for layout in LAYOUTS:
        if layout.peft_type == kind:
            return layout
    if isinstance(kind, str) and kind.removeprefix(OWN).lower() in METHODS and kind.startswith(OWN):
        return OwnLayout(kind.removeprefix(OWN).lower())
    known = [layout.peft_type for layout in LAYOUTS]
    raise UnsupportedError(
        "this PEFT method is not covered",
        where=where,
        got=f"peft_type={kind!r}",
        expected=", ".join(known),
        hint=nearest(str(kind), known),
    )


def layout_for(spec: TargetedMethod) -> Layout:
    """The layout that an adapter is written in: PEFT's where PEFT can say what the spec says."""
    for layout in LAYOUTS:
        if spec.name in layout.methods and layout.can_say(spec):
            return layout
    return OwnLayout(spec.name)


__all__ = ["LAYOUTS", "Layout", "layout_for", "layout_of"]
