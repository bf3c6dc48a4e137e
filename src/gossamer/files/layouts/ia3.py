"""peft_type IA3: one vector a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.adapter import Tensors
from gossamer.files.layouts.layout import Layout, listed
from gossamer.methods import TargetedMethod
from gossamer.methods.ia3 import IA3, SLOT
from gossamer.methods.targeted import exactly


class IA3Layout(Layout):
    """`ia3_l`: (out, 1), or (1, in) at `feedforward_modules`."""

    peft_type = "IA3"
    methods = ("ia3",)
    slots = (SLOT,)
    modelled = {"target_modules": None, "exclude_modules": None, "feedforward_modules": None, "modules_to_save": None}
    descriptive = {"fan_in_fan_out": False, "init_ia3_weights": True}

    def fields(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"feedforward_modules": config.get("feedforward_modules") or ()}

    def said(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        assert isinstance(spec, IA3)
        if not self.resolved(spec, tensors):
            return {"feedforward_modules": listed(spec.feedforward_modules)}
        return {"feedforward_modules": listed(exactly(filter(spec.scales_input, self.targets(tensors))))}

    def resolved(self, spec: TargetedMethod, tensors: Tensors) -> bool:
        """PEFT wants its list of feedforward modules to be a part of its list of targets, entry by entry."""
        assert isinstance(spec, IA3)
        outputs, targets = spec.feedforward_modules, spec.target_modules
        listed_both = isinstance(outputs, tuple) and isinstance(targets, tuple)
        return outputs == "auto" or (listed_both and not {*outputs} <= {*targets}) or super().resolved(spec, tensors)
