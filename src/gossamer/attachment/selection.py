"""What a spec names on a model: paths by the part they play, with the modules and shapes there."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from gossamer.attachment.bypass import Bypass
from gossamer.methods import Shape


@dataclass(frozen=True)
class Selection:
    """The canonical paths a spec names, by the part they play; sorted as the model orders them.

    Attributes:
        targets: where the method's own layers stand; `saved`: modules trained whole; `biased`: biases trained alone.
        tokens: embedding -> the rows of it that are trained whole.
        modules, shapes: of all of them; shapes of experts and attention hold the matrices to adapt, and those of
            targets what they store in common.
        aliases: how many names a module has, for those that have several.
        bypass: of the whole model, the modules whose parameters are used without calling them.
        idle: path -> why layers have no effect there: targets of a stored adapter whose change must be zero.
        notes: what was left out, and why.
    """

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    biased: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, Shape]
    aliases: Mapping[str, int]
    bypass: Mapping[str, Bypass] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def target_set(self) -> frozenset[str]:
        """The targets, to look paths up in."""
        return frozenset(self.targets)

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.targets, *self.saved, *self.biased, *self.tokens)


def with_ties(shapes: Iterable[Shape]) -> dict[str, Shape]:
    """Shapes that know which of their parameters another one of them holds already."""
    first: dict[int, tuple[str, str]] = {}
    found: dict[str, Shape] = {}
    for shape in shapes:
        places = {name: first.setdefault(id(value), (shape.path, name)) for name, value in shape.parameters.items()}
        tied = {name: place for name, place in places.items() if place != (shape.path, name)}
        found[shape.path] = replace(shape, tied=tied) if tied else shape
    return found
