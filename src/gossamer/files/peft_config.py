"""PEFT's `adapter_config.json` and our specs, both ways. Written against peft 0.21; see docs/file-format.md."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gossamer.errors import AdapterFileError, SpecError, UnsupportedError, nearest
from gossamer.methods import LoRA, TargetedMethod
from gossamer.methods.base import exactly

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


def spec_from_config(config: Mapping[str, Any], where: str, whole: Collection[str] = ()) -> TargetedMethod:
    """The spec that a PEFT config describes.

    Args:
        whole: the modules that the file holds whole parameters of; they say what PEFT's looser rule for
            `modules_to_save` (any name with that ending) has taken.

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
        "modules_to_save": _saved(config.get("modules_to_save") or (), whole),
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


def _saved(entries: Any, whole: Collection[str]) -> Any:
    """`modules_to_save` in our sense: suffixes after a dot.

    PEFT adds both "classifier" and "score" to a classifier's list, of which a model has one; and its "norm" takes
    every `input_layernorm` too.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return entries  # the spec says what is wrong with it
    names = {part for path in whole for part in path.split(".")}
    kept = [entry for entry in entries if entry not in ("classifier", "score") or entry in names]
    loose = sorted({name for entry in kept for name in names if name.endswith(entry) and name not in kept})
    return [*kept, *loose]


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
    spec: TargetedMethod, targets: Sequence[str], whole: Sequence[str], foreign: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """The PEFT config of an adapter; the one it was read from, unchanged, where that still says the same.

    Args:
        targets: the paths that carry factors; written out where PEFT would resolve the spec's own pattern differently.
        whole: the paths whose own parameters were trained.
        foreign: the config (or part of one) that came with the adapter.
    """
    assert isinstance(spec, LoRA)
    if all(key in foreign for key in ("peft_type", "r", "lora_alpha")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if spec_from_config(foreign, where, whole) == spec:
                return dict(foreign)
    pattern = spec.target_modules
    layers = spec.layers_to_transform
    resolved = pattern == "all-linear" or (layers is not None and (isinstance(pattern, str) or not _numbered(targets)))
    modelled = {
        "peft_type": "LORA",
        "r": spec.r,
        "lora_alpha": _plain(spec.alpha),
        "target_modules": _listed(exactly(targets) if resolved else pattern),
        "exclude_modules": None if resolved else _listed(spec.exclude_modules) or None,
        "layers_to_transform": None if resolved else _listed(layers),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: _plain(value) for key, value in spec.alpha_pattern.items()},
        "modules_to_save": _roots([path for path in whole if is_saved(path, spec)]) or None,
        "lora_dropout": spec.dropout,
        "bias": spec.bias,
        "use_rslora": spec.scaling == "rslora",
        "init_lora_weights": "gaussian" if spec.start == "gaussian" else True,
    }
    defaults = {key: value for key, value in KNOWN.items() if key != "peft_version"}
    return defaults | dict(foreign) | modelled


def is_saved(path: str, spec: TargetedMethod) -> bool:
    """Whether `modules_to_save` names the module, or one that it is a part of."""
    return any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", path) for entry in spec.modules_to_save)


def _roots(paths: list[str]) -> list[str]:
    """The paths that are not below another one; whole, so that PEFT's looser rule takes nothing else."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _numbered(targets: Sequence[str]) -> bool:
    """Whether PEFT finds the layer's number in every path; it wants two names before it."""
    return all(re.match(r".*?\.[^.]*\.\d+\.", path) for path in targets)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
