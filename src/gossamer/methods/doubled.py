"""A start that is made of the weight, `B A - B0 A0`, as the plain adapter of twice the rank that computes the same."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from gossamer.adapter import Tensors
from gossamer.errors import StateError
from gossamer.methods.factored import PAIRS, RANDOM_STARTS, Factored

FACTORS = (*PAIRS[0], *PAIRS[1])
Spec = TypeVar("Spec", bound=Factored)


def as_plain(spec: Spec, tensors: Tensors) -> tuple[Spec, Tensors]:
    """Spec and tensors of the plain adapter of twice the rank that says the same as one with a start of the weight."""
    if spec.start in RANDOM_STARTS:
        return spec, tensors
    growth = 2.0 if spec.scaling == "standard" else 2**0.5
    plain = spec.replace(
        r=2 * spec.r,
        alpha=spec.alpha * growth,
        rank_pattern={pattern: 2 * rank for pattern, rank in spec.rank_pattern.items()},
        alpha_pattern={pattern: alpha * growth for pattern, alpha in spec.alpha_pattern.items()},
        start="kaiming",
    )
    return plain, {path: _plain_slots(slots) for path, slots in tensors.items()}


def _plain_slots(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`B A - B0 A0` as one pair of factors: A over A0, B beside -B0."""
    found = {name: slot for name, slot in slots.items() if not name.startswith("start_")}
    for name in [name for name in found if "start_A" in slots and name in FACTORS]:
        start = slots["start_A"] if name.endswith("A") else -slots["start_B"]
        found[name] = torch.cat([found[name], start.to(found[name].dtype)], dim=0 if name.endswith("A") else 1)
    return found


def doubled(spec: Factored, tensors: Tensors) -> tuple[Factored, Tensors]:
    """`as_plain`, of factors and constants of one dtype."""
    for path, slots in tensors.items() if spec.start not in RANDOM_STARTS else ():
        kinds = {str(slots[slot].dtype) for slot in slots if slot.startswith("start_") or slot in FACTORS}
        if len(kinds) > 1:
            what = "factors and the constants of their start differ in dtype"
            raise StateError(what, where=path, got=", ".join(sorted(kinds)))
    return as_plain(spec, tensors)


def halved(spec: Factored, tensors: Tensors) -> Tensors:
    """The trained factors, and the constants that a start subtracts."""
    if spec.start in RANDOM_STARTS:
        return tensors
    return {path: _halved(slots, spec.rank_at(path)) for path, slots in tensors.items()}


def _halved(slots: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    halves = dict(slots)
    for first, second in PAIRS:
        if first in slots and second in slots:
            inner, outer = slots[first], slots[second]
            halves |= {first: inner[:rank], "start_A": inner[rank:]}
            halves |= {second: outer[:, :rank], "start_B": -outer[:, rank:]}
    return halves
