"""peft_type LN_TUNING: the parameters of normalisations, whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError
from gossamer.files.layouts.layout import PREFIX, Layout, inside, is_saved
from gossamer.methods import TargetedMethod

_MARK = "ln_tuning_layers."


class NormLayout(Layout):
    """`<path>.ln_tuning_layers.weight`, `.bias`; what `modules_to_save` trains stands without the middle part."""

    peft_type = "LN_TUNING"
    methods = ("norm",)
    modelled = {"target_modules": None, "exclude_modules": None, "modules_to_save": None}

    def split(self, name: str, where: str) -> tuple[str, str]:
        path, mark, slot = inside(name, PREFIX, where).rpartition(f".{_MARK}")
        return (path, _MARK + slot) if mark else super().split(name, where)

    def fields(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {}

    def targets(self, tensors: Tensors) -> dict[str, Mapping[str, Tensor]]:
        return {path: slots for path, slots in tensors.items() if any(slot.startswith(_MARK) for slot in slots)}

    def check_module(self, path: str, slots: Mapping[str, Tensor], spec: TargetedMethod, where: str) -> None:
        if not all(slot.startswith(_MARK) for slot in slots):
            raise AdapterFileError("a module trained in two ways", where=f"{where}: {path}", got=", ".join(slots))

    def written(self, adapter: Adapter) -> tuple[TargetedMethod, Tensors]:
        spec, tensors = super().written(adapter)
        return spec, {
            path: slots if is_saved(path, spec) else {_MARK + slot: tensor for slot, tensor in slots.items()}
            for path, slots in tensors.items()
        }

    def restored(self, spec: TargetedMethod, tensors: Tensors) -> Tensors:
        return {
            path: {slot.removeprefix(_MARK): tensor for slot, tensor in slots.items()}
            for path, slots in tensors.items()
        }

    def said(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        return {}
