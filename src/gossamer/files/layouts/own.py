"""What PEFT has no type for: the same folder under a `peft_type` of our own, which PEFT refuses by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError
from gossamer.files.layouts.layout import Layout, is_saved, place
from gossamer.methods import TargetedMethod
from gossamer.methods.bottleneck import Bottleneck

OWN = "GOSSAMER_"
_PARTS = ("down", "up", "norm")
"""What a bottleneck's slots begin with: `down.weight` and so on."""


class OwnLayout(Layout):
    """`base_model.model.<path>.<slot>`; the spec is in `gossamer.json` alone, whose digest holds all of it together."""

    complete = False
    modelled = {}

    def __init__(self, method: str) -> None:
        self.peft_type = OWN + method.upper()  # pyright: ignore[reportAttributeAccessIssue]
        self.methods = (method,)  # pyright: ignore[reportAttributeAccessIssue]

    def fields(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        raise AdapterFileError(
            f"the spec of an adapter of peft_type={self.peft_type!r} is in gossamer.json, which is missing", where=where
        )

    def targeted(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> dict[str, Any]:
        return {}

    def restored(self, spec: TargetedMethod, tensors: Tensors) -> Tensors:
        """Names split after the module's path, which only the spec tells from the beginning of a slot."""
        if not isinstance(spec, Bottleneck):
            return tensors
        found: dict[str, dict[str, Any]] = {}
        for path, slots in tensors.items():
            owner, _, part = path.rpartition(".")
            layer = f"{owner}.down" in tensors and f"{owner}.up" in tensors and not is_saved(f"{owner}.down", spec)
            inside = part in _PARTS and layer
            for slot, tensor in slots.items():
                if inside:
                    place(found, owner, f"{part}.{slot}", tensor, path)
                else:
                    place(found, path, slot, tensor, path)
        return found

    def config(self, adapter: Adapter, where: str) -> dict[str, Any]:
        known = self.known
        kept = {key: value for key, value in adapter.foreign.items() if key in known}
        return (
            {key: value for key, value in known.items() if key != "peft_version"} | kept | {"peft_type": self.peft_type}
        )

    def said(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        return {}
