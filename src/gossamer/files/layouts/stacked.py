"""Factors of matrices that a module uses itself: stacked experts and torch's attention, as PEFT nests their wrappers.

PEFT wraps a module once for each of its parameters that is adapted, the one declared last outermost:

    experts.base_layer.lora_A.weight    gate_up_proj        experts.lora_A.weight    down_proj
    attn.lora_A.weight                  in_proj_weight      attn.base_layer.out_proj.lora_A.weight

The names of the parameters are not in the file: `target_parameters` gives them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from gossamer.adapter import Tensors
from gossamer.errors import AdapterFileError, UnsupportedError

Nested = dict[str, dict[int, dict[str, Tensor]]]
"""Module path -> how many wrappers are further out -> slot -> tensor."""

DECLARED = ("gate_up_proj", "down_proj")
"""The order in which transformers' experts declare their parameters."""
ATTENTION = ("in_proj_weight", "out_proj.weight")
_OUT_PROJ = -1


def any_wrapped(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether a file may hold factors of a module's own parameters."""
    marks = (".base_layer.lora_", ".base_layer.out_proj.lora_")
    return bool(config.get("target_parameters")) or any(mark in name for name in names for mark in marks)


def collect(nested: Nested, path: str, slot: str, tensor: Tensor) -> None:
    """Note a factor under its module and its depth there."""
    depth = 0
    if path.endswith(".base_layer.out_proj"):
        path, depth = path.removesuffix(".base_layer.out_proj"), _OUT_PROJ
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    nested.setdefault(path, {}).setdefault(depth, {})[slot] = tensor


def unnested(nested: Nested, config: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, Tensor]]:
    """Module path, slot and tensor of each; slots of matrices are `<parameter>.<factor>`."""
    for path, levels in nested.items():
        names = _names(path, [*levels], config, where)
        for depth, slots in levels.items():
            for slot, tensor in slots.items():
                yield path, f"{names[depth]}.{slot}" if names[depth] else slot, tensor


def _names(path: str, depths: list[int], config: Mapping[str, Any], where: str) -> dict[int, str]:
    """Depth -> name of the parameter; "" for a module that is adapted as a whole."""
    if _OUT_PROJ in depths:
        return dict(zip((0, _OUT_PROJ), ATTENTION, strict=True)) | dict.fromkeys(set(depths) - {0, _OUT_PROJ}, "")
    named = _parameters_at(path, config.get("target_parameters"), len(depths))
    if depths == [0] and (not named or _is_target(path, config.get("target_modules"))):
        return {0: ""}
    if sorted(depths) != [*range(len(named))]:
        raise AdapterFileError(
            "wrapped parameters that target_parameters does not name",
            where=f"{where}: {path}",
            got=f"{len(depths)} in the file, {len(named)} named: {', '.join(named)}",
        )
    return dict(enumerate(reversed(in_declared_order(named, f"{where}: {path}"))))


def _parameters_at(path: str, entries: Any, count: int) -> list[str]:
    """Which of the module's parameters are named; by entries with a dot alone, if those are as many as are stored."""
    entries = [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []
    found = [(entry, entry.rpartition(".")[2]) for entry in entries]
    found = [(entry, name) for entry, name in found if f".{path}.{name}".endswith(f".{entry}")]
    exact = {name for entry, name in found if "." in entry}
    return sorted(exact if len(exact) == count else {name for _, name in found})


def _is_target(path: str, pattern: Any) -> bool:
    if isinstance(pattern, str):
        try:
            return pattern != "all-linear" and re.fullmatch(pattern, path) is not None
        except re.error:
            return False
    return isinstance(pattern, list) and any(
        isinstance(entry, str) and f".{path}".endswith(f".{entry}") for entry in pattern
    )


def in_declared_order(names: Iterable[str], where: str) -> list[str]:
    """The parameters of one module as it declares them. Raises `UnsupportedError` where that is not known."""
    names = sorted(names)
    if len(names) > 1 and not set(names) <= set(DECLARED):
        raise UnsupportedError(
            "PEFT's file tells the parameters of one module apart by the order in which it declares them",
            where=where,
            got=", ".join(names),
            expected=", ".join(DECLARED),
        )
    return sorted(names, key=lambda name: DECLARED.index(name) if name in DECLARED else 0)


def matrices(slots: Mapping[str, Tensor]) -> list[str]:
    """The parameters of a module that have factors of their own, and that `target_parameters` must name."""
    found = list(dict.fromkeys(slot.rpartition(".")[0] for slot in slots if slot.endswith((".lora_A", ".lora_B"))))
    return [] if set(found) == set(ATTENTION) else found


def parameters_in(tensors: Tensors) -> list[str]:
    """Whole paths of all such parameters."""
    return [f"{path}.{name}" for path, slots in tensors.items() for name in matrices(slots)]


def nesting(matrix: str, slots: Mapping[str, Tensor], path: str) -> str:
    """What stands between the module's path and the factor of one of its matrices."""
    names = matrices(slots)
    if not names:
        return ".base_layer.out_proj" if matrix == ATTENTION[1] else ""
    names = in_declared_order(names, path)
    return ".base_layer" * (len(names) - 1 - names.index(matrix))
