"""peft_type VERA: two vectors a module, and the projections that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError
from gossamer.files.layouts.layout import Layout
from gossamer.methods import TargetedMethod
from gossamer.methods.vera import VeRA

_SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}


class VeRALayout(Layout):
    """`vera_lambda_d` (r), `vera_lambda_b` (out); `vera_A` and `vera_B` once, unless they are to be drawn again."""

    peft_type = "VERA"
    methods = ("vera",)
    slots = ("vera_lambda_b", "vera_lambda_d")
    assumed = ("r",)
    modelled = {
        "r": 256,
        "target_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
    }
    descriptive = {"fan_in_fan_out": False, "init_weights": True}
    refused = {"bias": "none"}

    def split(self, name: str, where: str) -> tuple[str, str]:
        return ("", _SHARED[name]) if name in _SHARED else super().split(name, where)

    def fields(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {
            "r": config.get("r", 256),
            "d_initial": config.get("d_initial", 0.1),
            "projection_seed": config.get("projection_prng_key", 0),
            "dropout": config.get("vera_dropout", 0.0),
        }

    def check(self, tensors: Tensors, spec: TargetedMethod, where: str) -> None:
        super().check(tensors, spec, where)
        assert isinstance(spec, VeRA)
        shared = {slot: tensor.ndim for slot, tensor in tensors.get("", {}).items()}
        if shared and shared != dict.fromkeys(_SHARED.values(), 2):
            raise AdapterFileError("the shared projections are two matrices", where=where, got=str(shared))
        for path, slots in self.targets(tensors).items():
            got = tuple(slots["vera_lambda_d"].shape)
            if got != (spec.r,):
                what = "a vector that does not have the rank the config gives"
                raise AdapterFileError(what, where=f"{where}: {path}", got=str(got), expected=str((spec.r,)))

    def accounted(self, path: str, slots: Mapping[str, Tensor], spec: TargetedMethod) -> bool:
        return path == "" or super().accounted(path, slots, spec)

    def name(self, path: str, slot: str, spec: TargetedMethod, slots: Mapping[str, Tensor]) -> str:
        return super().name(path, slot, spec, slots) if path else f"base_model.{slot}"

    def said(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        assert isinstance(spec, VeRA)
        return {
            "r": spec.r,
            "d_initial": spec.d_initial,
            "projection_prng_key": spec.projection_seed,
            "vera_dropout": spec.dropout,
        }

    def facts(self, adapter: Adapter, tensors: Tensors) -> dict[str, Any]:
        return {"save_projection": "" in tensors}
