"""An adapter as a layout says it: the names of its tensors, and its config."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from gossamer.adapter import Adapter
from gossamer.errors import AdapterFileError
from gossamer.files.layouts import layout_for, stacked
from gossamer.files.layouts.reading import is_saved, named_targets, spec_of, whole
from gossamer.files.misread import warn_of_misreading
from gossamer.methods import TargetedMethod
from gossamer.methods.peft import PeftLayout, Stored, listed
from gossamer.methods.targeted import exactly


def encode(adapter: Adapter, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config, and the tensors under their names in the file; warns of what PEFT would misread."""
    layout, stored = _stored(adapter)
    tensors = {
        _name(layout, path, slot, slots): tensor.detach().clone().contiguous()
        for path, slots in stored.adapter.tensors.items()
        for slot, tensor in slots.items()
    }
    if layout.factored:
        warn_of_misreading(str((adapter.base or {}).get("architecture", "")), stored.targets, where)
    return dict(sorted(_config(layout, stored, where).items())), tensors


def config_of(adapter: Adapter, where: str) -> dict[str, Any]:
    """PEFT's config of an adapter."""
    return _config(*_stored(adapter), where)


def _config(layout: PeftLayout, stored: Stored, where: str) -> dict[str, Any]:
    """The one the adapter was read from, unchanged, where that still says the same."""
    foreign, known = stored.adapter.foreign, layout.known
    facts = {name: key.write(stored) for name, key in layout.keys.items() if key.write and not key.field}
    if foreign.get("peft_type") == layout.peft_type:
        if _means(layout, foreign, stored, where):
            return dict(foreign) | {key: facts[key] for key in facts if foreign.get(key, known[key]) != facts[key]}
    else:
        foreign = {key: value for key, value in foreign.items() if key in known}
    defaults = {key: value for key, value in known.items() if key != "peft_version"}
    return defaults | dict(foreign) | _targeting(layout, stored) | _said(layout, stored) | dict(layout.given) | facts


def _stored(adapter: Adapter) -> tuple[PeftLayout, Stored]:
    """The layout, and spec and tensors as the file says them, and which modules the config names."""
    assert isinstance(adapter.spec, TargetedMethod)
    layout = layout_for(adapter.spec)
    spec, tensors = layout.encode(adapter.spec, adapter.tensors)
    if layout.mark:
        tensors = {
            path: slots if is_saved(path, spec) else {layout.mark + slot: tensor for slot, tensor in slots.items()}
            for path, slots in tensors.items()
        }
    targets, parameters = named_targets(layout, tensors), stacked.parameters_in(tensors)
    resolved = _resolved(layout, spec, targets, parameters)
    return layout, Stored(replace(adapter, spec=spec, tensors=tensors), targets, parameters, resolved)


def _name(layout: PeftLayout, path: str, slot: str, slots: Mapping[str, Tensor]) -> str:
    """A tensor's name in the file; `slots` are all of the module's."""
    if not path and slot in layout.whole_model:
        return layout.whole_model[slot]
    for known, ending in layout.endings:
        if slot == known:
            return f"{layout.prefix}{path}{ending}"
    matrix, _, factor = slot.rpartition(".")
    if matrix and layout.factored:
        return f"{layout.prefix}{path}{stacked.nesting(matrix, slots, path)}{layout.slots[factor]}"
    within = ".base_layer" if layout.factored and not layout.slots.keys().isdisjoint(slots) else ""
    return f"{layout.prefix}{path}{within}.{slot}"


def _means(layout: PeftLayout, foreign: Mapping[str, Any], stored: Stored, where: str) -> bool:
    """Whether a config still describes the spec."""
    try:
        return spec_of(layout, foreign, stored.adapter.tensors, where) == stored.spec
    except AdapterFileError:
        return False


def _said(layout: PeftLayout, stored: Stored) -> dict[str, Any]:
    """What the config says for the method's own fields."""
    found = {}
    for name, key in layout.keys.items():
        if key.field:
            value = getattr(stored.spec, key.field)
            theirs = next((theirs for theirs, ours in key.values.items() if ours == value), value)
            found[name] = key.write(stored) if key.write else listed(theirs)
    return found


def _targeting(layout: PeftLayout, stored: Stored) -> dict[str, Any]:
    """The keys that name modules; written out where PEFT would resolve the spec's own differently."""
    spec, paths = stored.spec, [path for path in whole(layout, stored.adapter.tensors) if is_saved(path, stored.spec)]
    roots = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    said = {
        "target_modules": listed(exactly(stored.targets) if stored.resolved else spec.target_modules),
        "exclude_modules": None if stored.resolved else listed(spec.exclude_modules) or None,
        "layers_to_transform": None if stored.resolved else listed(spec.layers_to_transform),
        "layers_pattern": None,
        "modules_to_save": roots or None,  # whole paths, so that PEFT's looser rule takes nothing else
    }
    return {key: said[key] for key in layout.targeting}


def _resolved(layout: PeftLayout, spec: TargetedMethod, targets: list[str], parameters: list[str]) -> bool:
    """Whether the config names every target by its path, because PEFT cannot say, or not so, what the spec says.

    PEFT applies no exclusions and layers to `target_parameters`, and knows stacked experts by no other name.
    """
    limited = bool(spec.exclude_modules) or spec.layers_to_transform is not None
    entries = getattr(spec, "target_parameters", ())
    covered = all(any(f".{name}".endswith(f".{entry}") for entry in entries) for name in parameters)
    if layout.resolved(spec) or (parameters and (limited or not covered)):
        return True
    pattern = spec.target_modules
    if pattern in ("all-linear", "auto") or (spec.exclude_modules and "exclude_modules" not in layout.targeting):
        return True
    numbers = "layers_to_transform" in layout.targeting and not isinstance(pattern, str)
    return spec.layers_to_transform is not None and not (numbers and all(map(_numbered, targets)))


def _numbered(path: str) -> bool:
    """Whether PEFT finds the layer's number in a path; it wants two names before it."""
    return re.match(r".*?\.[^.]*\.\d+\.", path) is not None
