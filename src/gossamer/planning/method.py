"""What is trained: a method in the few words that a planner needs, with nothing of torch in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from gossamer.errors import SpecError, TargetError, UnsupportedError, nearest
from gossamer.planning.shape import Linear, ModelShape

METHODS = ("lora", "dora", "full")
_COSTLY = ("target_parameters", "rank_pattern", "layers_to_transform", "modules_to_save", "trainable_tokens", "bias")
_COSTLY += ("exclude_modules",)
"""Fields of a spec that change memory in ways which are not written down here, unless they are empty."""


@dataclass(frozen=True)
class Tuning:
    """LoRA, DoRA or all parameters.

    Attributes:
        name: "lora", "dora" or "full".
        r: rank.
        target_modules: "all-linear", suffixes of module paths, or one regular expression for whole paths.
        dropout: probability; above 0 each adapted module keeps a mask and an input of its own.
        start: as in the spec; one made of the weight keeps its first factors beside the trained ones.
    """

    name: str = "lora"
    r: int = 8
    target_modules: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    start: str = "gaussian"

    @classmethod
    def of(cls, method: Any) -> Tuning:
        """From a name, a mapping, a spec of `gossamer.methods`, or nothing.

        Raises: UnsupportedError for another method, or a field whose cost is not known; SpecError for unknown fields.
        """
        if method is None or isinstance(method, Tuning):
            return method or cls()
        if isinstance(method, str):
            method = {"name": method}
        given = dict(method) if isinstance(method, Mapping) else method.to_dict()
        name = given.get("name", "lora")
        if name not in METHODS:
            raise UnsupportedError(
                "the plan does not know this method",
                got=str(name),
                expected=", ".join(METHODS),
                hint=nearest(str(name), METHODS) or "LoRA of the same rank is close to most of them",
            )
        for field in _COSTLY if name != "full" else ():
            if given.get(field, "none") not in (None, "none") and given[field] not in ([], {}, ()):
                raise UnsupportedError(f"the plan does not know what {field} costs", got=repr(given[field]))
        known = {field.name for field in fields(cls)}
        ignored = {"alpha", "alpha_pattern", "scaling", *_COSTLY}
        unknown = [f"{key}: unknown; {nearest(key, known)}" for key in given if key not in known | ignored]
        if unknown:
            raise SpecError("method is not valid", faults=unknown)
        values: dict[str, Any] = {key: value for key, value in given.items() if key in known}
        targets = values.get("target_modules", "all-linear")
        values["target_modules"] = targets if isinstance(targets, str) else tuple(targets)
        if not isinstance(values.get("r", 1), int) or values.get("r", 1) < 1:
            raise SpecError("method is not valid", faults=[f"r: must be a whole number from 1; got {values['r']!r}"])
        return cls(name="full") if name == "full" else cls(**values)

    @property
    def pairs(self) -> int:
        """Pairs of factors at a module: two where the start's own are kept."""
        return 1 if self.start in ("gaussian", "kaiming") else 2

    def targets(self, shape: ModelShape) -> tuple[Linear, ...]:
        """The modules of a layer that are adapted. Raises `TargetError` for a pattern that names none."""
        return () if self.name == "full" else _targets(self.target_modules, shape)

    def factors(self, linear: Linear) -> int:
        """Trained numbers at a module: `r (in + out)`, and DoRA's magnitudes."""
        return self.r * (linear.inner + linear.outer) + (linear.outer if self.name == "dora" else 0)

    def trained(self, shape: ModelShape) -> int:
        """Trained numbers in all."""
        if self.name == "full":
            return shape.total
        return shape.layers * sum(map(self.factors, self.targets(shape)))

    def __str__(self) -> str:
        if self.name == "full":
            return "full fine-tuning"
        targets = self.target_modules if isinstance(self.target_modules, str) else ", ".join(self.target_modules)
        return f"{'LoRA' if self.name == 'lora' else 'DoRA'} r={self.r} on {targets}"


@cache
def _targets(patterns: str | tuple[str, ...], shape: ModelShape) -> tuple[Linear, ...]:
    known = sorted({linear.path.rpartition(".")[2] for linear in shape.linears})
    if isinstance(patterns, str):
        if patterns in ("all-linear", "auto"):
            return shape.linears
        chosen = _matching(patterns, shape, known)
        _refuse_beside(shape, patterns, lambda path: bool(re.fullmatch(patterns, path)))
        return chosen
    _refuse_beside(
        shape, str([*patterns]), lambda path: any(path == one or path.endswith("." + one) for one in patterns)
    )
    for entry in patterns:
        if not any(_named(entry, linear) for linear in shape.linears):
            raise TargetError(
                f"target_modules: {entry!r} matches no module of a layer",
                expected=f"one of {', '.join(known)}",
                hint=nearest(entry, known),
            )
    return tuple(linear for linear in shape.linears if any(_named(entry, linear) for entry in patterns))


def _refuse_beside(shape: ModelShape, patterns: str, matches: Callable[[str], bool]) -> None:
    """What is adapted in a tower would be counted nowhere."""
    for part in shape.parts:
        found = next((path for path, _, _ in part.linears if matches(path)), None)
        if found is not None:
            raise UnsupportedError(
                "the plan knows adapters at the language model alone, and these patterns name modules of another part",
                where=found,
                got=patterns,
                hint=f"all-linear, or a regular expression for paths below {shape.root}",
            )


def _named(entry: str, linear: Linear) -> bool:
    return _ends(entry, linear.path)


def _ends(entry: str, path: str) -> bool:
    return path == entry or path.endswith("." + entry)


def _matching(pattern: str, shape: ModelShape, known: list[str]) -> tuple[Linear, ...]:
    """By regular expression, which has to mean the same modules in all layers."""
    try:
        found = {
            linear: {bool(re.fullmatch(pattern, shape.path(linear, layer))) for layer in range(shape.layers)}
            for linear in shape.linears
        }
    except re.error as error:
        raise SpecError("method is not valid", faults=[f"target_modules: {pattern!r}: {error}"]) from None
    if any(len(answers) > 1 for answers in found.values()):
        raise UnsupportedError("the plan knows only layers that are all adapted alike", got=pattern)
    chosen = tuple(linear for linear, answers in found.items() if True in answers)
    if not chosen:
        raise TargetError("the target expression matches no module", got=pattern, expected=", ".join(known))
    return chosen
