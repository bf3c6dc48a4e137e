"""PEFT's `adapter_config.json` and our specs, both ways. Written against peft 0.21; see docs/file-format.md."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.errors import AdapterFileError, SpecError, UnsupportedError, nearest
from gossamer.methods import LoRA, TargetedMethod

MODELLED = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "init_lora_weights": True,
}
"""Keys that a LoRA spec says something about, with PEFT's defaults."""

DESCRIPTIVE = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "megatron_core": "megatron.core",
    "peft_version": None,
    "qalora_group_size": 16,
    "revision": None,
    "task_type": None,
}
"""Keys that change nothing about how the tensors act, kept as they are."""

REFUSED = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
"""Features this version does not cover: refused by name when set to anything but PEFT's default."""

KNOWN = MODELLED | DESCRIPTIVE | REFUSED


def spec_from_config(config: Mapping[str, Any], where: str) -> TargetedMethod:
    """The spec that a PEFT config describes.

    Raises:
        UnsupportedError: a method or feature that is not covered, by name.
        AdapterFileError: missing, mistyped or misspelt keys.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            "this PEFT method is not covered", where=where, got=f"peft_type={kind!r}", expected="LORA"
        )
    _check_keys(config, where)
    fields = {
        "r": config["r"],
        "alpha": config["lora_alpha"],
        "target_modules": config["target_modules"],
        "exclude_modules": config.get("exclude_modules") or (),
        "layers_to_transform": config.get("layers_to_transform"),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "modules_to_save": config.get("modules_to_save") or (),
        "dropout": config.get("lora_dropout", 0.0),
        "bias": config.get("bias", "none"),
        "scaling": _scaling(config.get("use_rslora", False), where),
        "start": _start(config.get("init_lora_weights", True), where),
    }
    try:
        return LoRA.from_dict(fields)
    except SpecError as error:
        raise AdapterFileError("the adapter's config is not valid", where=where, got="; ".join(error.faults)) from None


def _check_keys(config: Mapping[str, Any], where: str) -> None:
    missing = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if missing:
        raise AdapterFileError(
            "the config does not say what the adapter's scale or targets are", where=where, expected=", ".join(missing)
        )
    for key, default in REFUSED.items():
        if config.get(key, default) not in (default, None, False, {}, []):
            raise UnsupportedError("this PEFT feature is not covered", where=where, got=f"{key}={config[key]!r}")
    unknown = [key for key in config if key not in KNOWN]
    for key in unknown:
        hint = nearest(key, KNOWN, count=1, cutoff=0.8)
        if hint:
            raise AdapterFileError("a config key that looks misspelt", where=where, got=key, hint=hint)
    if unknown:
        warnings.warn(f"{where}: keys kept but not understood: {', '.join(sorted(unknown))}", stacklevel=2)


def _scaling(use_rslora: Any, where: str) -> str:
    if not isinstance(use_rslora, bool):
        raise AdapterFileError("not a boolean", where=where, got=f"use_rslora={use_rslora!r}", expected="true or false")
    return "rslora" if use_rslora else "standard"


def _start(init: Any, where: str) -> str:
    if isinstance(init, bool):
        return "kaiming"
    if init == "gaussian":
        return "gaussian"
    raise UnsupportedError(
        "this adapter's tensors are relative to a base that its initialisation changed",
        where=where,
        got=f"init_lora_weights={init!r}",
        hint="in PEFT, save it with path_initial_model_for_weight_conversion, which writes a plain LoRA",
    )


def config_from_spec(
    spec: TargetedMethod, targets: Sequence[str], foreign: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """The PEFT config of an adapter; the one it was read from, unchanged, where that still says the same.

    Args:
        targets: the paths that carry factors; written out where PEFT would resolve the spec's own pattern differently.
        foreign: the config (or part of one) that came with the adapter.
    """
    assert isinstance(spec, LoRA)
    if all(key in foreign for key in ("peft_type", "r", "lora_alpha")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if spec_from_config(foreign, where) == spec:
                return dict(foreign)
    pattern = spec.target_modules
    resolved = pattern == "all-linear" or (isinstance(pattern, str) and spec.layers_to_transform is not None)
    layers = spec.layers_to_transform
    modelled = {
        "peft_type": "LORA",
        "r": spec.r,
        "lora_alpha": _plain(spec.alpha),
        "target_modules": sorted(targets) if resolved else _listed(pattern),
        "exclude_modules": None if resolved else _listed(spec.exclude_modules) or None,
        "layers_to_transform": None if resolved else _listed(layers),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: _plain(value) for key, value in spec.alpha_pattern.items()},
        "modules_to_save": list(spec.modules_to_save) or None,
        "lora_dropout": spec.dropout,
        "bias": spec.bias,
        "use_rslora": spec.scaling == "rslora",
        "init_lora_weights": "gaussian" if spec.start == "gaussian" else True,
    }
    defaults = {key: value for key, value in KNOWN.items() if key != "peft_version"}
    return defaults | dict(foreign) | modelled


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
