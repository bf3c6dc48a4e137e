"""What an adapter's file holds, as a layout says it: its tensors by module, and the spec that its config describes."""

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from gossamer.adapter import Tensors
from gossamer.errors import AdapterFileError, SpecError, UnsupportedError, nearest
from gossamer.files.layouts import experts, stacked
from gossamer.methods import METHODS, TargetedMethod
from gossamer.methods.factored import Factored
from gossamer.methods.peft import ConfigKey, PeftLayout, check_names, listed, token_rows
from gossamer.methods.targeted import exactly
from gossamer.methods.tokens import SLOT

_NOTHING: tuple[Any, ...] = (None, False, {}, [])
"""What says nothing, whatever the key: a feature of a newer or another PEFT that is off."""
_HEADS = ("lm_head", "embed_out")


def check_keys(layout: PeftLayout, config: Mapping[str, Any], where: str) -> None:
    """Refuse features that are not covered and keys that look misspelt; say what is assumed or not understood."""
    for key, default in layout.refused.items():
        if config.get(key, default) not in (default, *_NOTHING):
            raise UnsupportedError("this PEFT feature is not covered", where=where, got=f"{key}={config[key]!r}")
    known = layout.known
    unknown = [key for key in config if key not in known and config[key] not in _NOTHING]
    for key in unknown:
        hint = nearest(key, known, count=1, cutoff=0.8)
        if hint:
            expected = f"the keys of peft_type={layout.peft_type!r}"
            raise AdapterFileError(
                "a config key that looks misspelt", where=where, got=key, expected=expected, hint=hint
            )
    absent = [f"{key}={known[key]!r}" for key in layout.assumed if key not in config]
    if absent:
        warnings.warn(f"{where}: missing keys, PEFT's defaults are taken: {', '.join(absent)}", stacklevel=2)
    if unknown:
        warnings.warn(f"{where}: keys kept but not understood: {', '.join(sorted(unknown))}", stacklevel=2)


# Tensors --------------------------------------------------------------------------------------------------------------


def sorted_out(layout: PeftLayout, stored: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Tensors:
    """The file's tensors by module and slot. Raises `AdapterFileError` for a name outside the model."""
    tensors: dict[str, dict[str, Tensor]] = {}
    nested: stacked.Nested = {}
    bases: dict[str, Tensor] = {}
    wrapped = layout.factored and stacked.any_wrapped(stored, config)
    for name, tensor in stored.items():
        path, slot = _split(layout, name, where)
        module = path.removesuffix(".base_layer") if layout.factored else path
        if wrapped and slot in ("lora_A", "lora_B"):
            stacked.collect(nested, path, slot, tensor)
        elif slot == "weight" and module != path:
            bases[module] = tensor
        else:
            _place(tensors, module, slot, tensor, f"{where}: {name}")
    for path, slot, tensor in stacked.unnested(nested, config, where):
        _place(tensors, path, slot, tensor, where)
    _drop_copies(bases, tensors, where)
    return tensors


def _split(layout: PeftLayout, name: str, where: str) -> tuple[str, str]:
    """Module path and slot of a tensor's name."""
    for slot, whole in layout.whole_model.items():
        if name == whole:
            return "", slot
    if not name.startswith(layout.prefix):
        expected = f"names that begin with {layout.prefix!r}"
        raise AdapterFileError("a tensor outside the model", where=f"{where}: {name}", expected=expected)
    inner = name[len(layout.prefix) :]
    path, mark, slot = inner.rpartition(f".{layout.mark}") if layout.mark else ("", "", "")
    if mark:
        return path, layout.mark + slot
    for slot, ending in layout.endings:
        if inner.endswith(ending):
            return inner[: -len(ending)], slot
    if layout.factored and inner.endswith(".lora_B.bias"):
        raise UnsupportedError("this PEFT feature is not covered", where=f"{where}: {name}", got="lora_bias")
    path, _, slot = inner.rpartition(".")
    return path, slot


def _place(tensors: dict[str, dict[str, Tensor]], path: str, slot: str, tensor: Tensor, where: str) -> None:
    """Put a tensor in its place, which must be free."""
    slots = tensors.setdefault(path, {})
    if slot in slots:
        raise AdapterFileError("two tensors for one place", where=where, got=f"{path}.{slot}")
    slots[slot] = tensor


def _drop_copies(copies: Mapping[str, Tensor], tensors: Tensors, where: str) -> None:
    """Accept `<path>.base_layer.weight` where it is a copy of the base's own embedding or head, as PEFT writes them.

    Raises `AdapterFileError` for any other module's, or of another shape than the factors have.
    """
    for path, weight in copies.items():
        slots = tensors.get(path, {})
        embedding = "lora_embedding_A" in slots and "lora_embedding_B" in slots
        first, second = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_A", "lora_B")
        named = embedding or path.rpartition(".")[2] in _HEADS
        if not named or any(name not in slots or slots[name].ndim != 2 for name in (first, second)):
            raise AdapterFileError(
                "a weight of the base's own, which no adapter changes",
                where=f"{where}: {path}.base_layer.weight",
                expected="such a copy beside the factors of an embedding or a head only",
            )
        expected = (slots[second].shape[1 if embedding else 0], slots[first].shape[0 if embedding else 1])
        if tuple(weight.shape) != expected:
            raise AdapterFileError(
                "a copy of the base's weight that does not fit the factors beside it",
                where=f"{where}: {path}.base_layer.weight",
                got=str(tuple(weight.shape)),
                expected=str(expected),
            )
    if copies:
        warnings.warn(
            f"{where}: copies of the base's own weights are left out, the model has them: {', '.join(copies)} "
            "(if they had been changed, for example by a resized vocabulary, load them into the model first)",
            stacklevel=2,
        )


def renewed(layout: PeftLayout, config: dict[str, Any], tensors: Tensors, where: str) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of single experts, which transformers stacks today, as those of the stack."""
    if not layout.factored or not experts.is_old(tensors):
        return config, tensors
    spec = spec_of(layout, config, tensors, where)
    assert isinstance(spec, Factored)
    return experts.stacked_anew(config, tensors, spec, where)


def restored(layout: PeftLayout, spec: TargetedMethod, tensors: Tensors) -> Tensors:
    """What was written, bit for bit; spec is the adapter's own."""
    if layout.mark or spec.dotted_slots:
        found: dict[str, dict[str, Tensor]] = {}
        parts = {slot.partition(".")[0] for slot in spec.dotted_slots}
        for path, slots in tensors.items():
            owner, _, part = path.rpartition(".")
            layer = all(f"{owner}.{one}".lstrip(".") in tensors for one in parts) and not is_saved(owner, spec)
            for slot, tensor in slots.items():
                inside = layer and f"{part}.{slot}" in spec.dotted_slots
                placed = (owner, f"{part}.{slot}") if inside else (path, slot.removeprefix(layout.mark))
                _place(found, *placed, tensor, path)
        return found
    return layout.decode(spec, tensors)


def is_target(layout: PeftLayout, path: str, slots: Mapping[str, Tensor]) -> bool:
    """Whether a module carries the method's own tensors."""
    if not (path or layout.factored or layout.whole_model):
        return False
    marked = bool(layout.mark) and any(slot.startswith(layout.mark) for slot in slots)
    parameters = layout.factored and any(slot.endswith((".lora_A", ".lora_B")) for slot in slots)
    return marked or parameters or not layout.slots.keys().isdisjoint(slots)


def named_targets(layout: PeftLayout, tensors: Tensors) -> list[str]:
    """The modules that `target_modules` names."""
    return [path for path, slots in tensors.items() if is_target(layout, path, slots) and not stacked.matrices(slots)]


def whole(layout: PeftLayout, tensors: Tensors) -> list[str]:
    """The modules whose own parameters were trained."""
    return [path for path, slots in tensors.items() if path and not is_target(layout, path, slots)]


def is_saved(path: str, spec: TargetedMethod) -> bool:
    """Whether `modules_to_save` names the module, or one that it is a part of."""
    return any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", path) for entry in spec.modules_to_save)


def check(layout: PeftLayout, tensors: Tensors, spec: TargetedMethod, where: str) -> None:
    """Every module's tensors are what the spec says they are, and complete. Raises `AdapterFileError`."""
    targets = [path for path, slots in tensors.items() if is_target(layout, path, slots)]
    for path, slots in tensors.items():
        place = f"{where}: {path}" if path else where
        shared = not path and bool(layout.whole_model)
        if (path in targets or shared) and layout.check:
            layout.check(spec, path, slots, place)
        elif path in targets:
            check_names(slots, layout.slots, place)
        elif not shared and not _accounted(path, slots, spec):
            raise AdapterFileError(
                "a tensor that the config does not account for",
                where=f"{where}: {path}.{next(iter(slots))}",
                expected=f"tensors of peft_type={layout.peft_type!r}, or parameters of modules_to_save",
                hint=nearest(path, targets),
            )
    if not targets:
        first = ", ".join([*tensors][:4])
        raise AdapterFileError(f"the file holds no tensors of peft_type={layout.peft_type!r}", where=where, got=first)


def _accounted(path: str, slots: Mapping[str, Tensor], spec: TargetedMethod) -> bool:
    """Whether the spec names the tensors of a module that is no target."""
    if SLOT in slots:
        rows = slots[SLOT]
        return len(slots) == 1 and rows.ndim == 2 and len(rows) == len(token_rows(path, spec.trainable_tokens))
    return is_saved(path, spec) or (getattr(spec, "bias", "none") == "all" and set(slots) == {"bias"})


# The spec -------------------------------------------------------------------------------------------------------------


def spec_of(layout: PeftLayout, config: Mapping[str, Any], tensors: Tensors, where: str) -> TargetedMethod:
    """The spec that a config describes, tensors being what it came with. Raises `AdapterFileError`."""
    if not layout.complete:
        raise AdapterFileError(
            f"the spec of an adapter of peft_type={layout.peft_type!r} is in gossamer.json, which is missing",
            where=where,
        )
    fields = {"modules_to_save": _saved(config.get("modules_to_save") or (), whole(layout, tensors))}
    if "target_modules" in layout.targeting:
        fields |= _targeted(layout, config, tensors, where)
    for name, key in layout.keys.items():
        value = _field(name, key, config, where, flag=bool(key.values) or name in layout.given)
        fields |= {key.field: value} if key.field else {}
    method = next(method for method in METHODS.values() if vars(method).get("peft") is layout)
    try:
        return method.from_dict(fields)
    except SpecError as error:
        faults = "; ".join(error.faults)
        raise AdapterFileError("the adapter's config is not valid", where=where, got=faults) from None


def _targeted(layout: PeftLayout, config: Mapping[str, Any], tensors: Tensors, where: str) -> dict[str, Any]:
    """The fields that name modules."""
    if layout.factored and config.get("target_parameters"):
        if config.get("exclude_modules") or config.get("layers_to_transform") is not None:  # not of PEFT's parameters
            config = {"target_modules": listed(exactly(named_targets(layout, tensors)))}
        config = dict(config) | {"target_modules": config.get("target_modules") or []}
    if config.get("target_modules") is None:
        raise AdapterFileError("the config does not say what its targets are", where=where, expected="target_modules")
    found = {
        "target_modules": config["target_modules"],
        "exclude_modules": config.get("exclude_modules") or (),
        "layers_to_transform": config.get("layers_to_transform"),
    }
    if config.get("layers_pattern"):  # says which number in a path is the layer's; the tensors' paths say it too
        if found["layers_to_transform"] is None:
            raise AdapterFileError("layers_pattern without layers_to_transform", where=where)
        found |= {"target_modules": exactly(named_targets(layout, tensors)), "layers_to_transform": None}
    return found


def _field(name: str, key: ConfigKey, config: Mapping[str, Any], where: str, *, flag: bool) -> Any:
    """What a key says for the spec's field."""
    value = config.get(name, key.default)
    if key.read:
        return key.read(value, where)
    if flag and isinstance(key.default, bool) and not isinstance(value, bool):
        raise AdapterFileError("not a boolean", where=where, got=f"{name}={value!r}", expected="true or false")
    if not value and key.default in (None, {}):
        return {} if key.default == {} else ()
    return next((ours for theirs, ours in key.values.items() if theirs == value), value)


def _saved(entries: Any, paths: Collection[str]) -> Any:
    """`modules_to_save` in our sense: suffixes after a dot.

    PEFT adds both "classifier" and "score" to a classifier's list, of which a model has one; and its "norm" takes
    every `input_layernorm` too.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return entries  # the spec says what is wrong with it
    names = {part for path in paths for part in path.split(".")}
    kept = [entry for entry in entries if entry not in ("classifier", "score") or entry in names]
    loose = sorted({name for entry in kept for name in names if name.endswith(entry) and name not in kept})
    return list(dict.fromkeys([*kept, *loose]))
