"""What a way of combining sees: the weighted changes of one matrix. And the table of the ways."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import UsageError, nearest


@dataclass(frozen=True)
class Change:
    """What one adapter does to the matrix: `outer @ inner`, and how much of it is wanted."""

    weight: float
    inner: Tensor
    """(r, in), at least float32."""
    outer: Tensor
    """(out, r), the adapter's own scaling in it."""
    scaling: float = 1.0
    """That scaling."""

    def dense(self) -> Tensor:
        """`B A`, (out, in), unweighted."""
        return self.outer @ self.inner


@dataclass(frozen=True)
class Matrix:
    """The changes of one matrix by all adapters that have one there, in their order."""

    path: str
    changes: tuple[Change, ...]
    generator: torch.Generator
    """Seeded from `seed` and the path, so that the order of modules does not matter."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.changes[0].outer.shape[0], self.changes[0].inner.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the exact sum: that of all changes together, as far as the matrix has it."""
        return min(sum(change.inner.shape[0] for change in self.changes), *self.shape)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """The weighted sum as one pair: A's over each other, `weight * B`'s side by side."""
        inner = torch.cat([change.inner for change in self.changes])
        return inner, torch.cat([change.weight * change.outer for change in self.changes], 1)


Result = Tensor | tuple[Tensor, Tensor]
"""The combined change: whole (out, in), or as A (r, in) and B (out, r)."""
Way = Callable[..., Result]
"""A way of combining: `way(matrix, **options)`."""

WAYS: dict[str, Way] = {}
"""Every way by its name."""


def way(name: str) -> Callable[[Way], Way]:
    """Register a way of combining under the name that `combine(method=...)` and the command take."""

    def registered(function: Way) -> Way:
        WAYS[name] = function
        return function

    return registered


def chosen_way(name: str, options: dict[str, Any]) -> Way:
    """The way of that name. Raises `UsageError` for an unknown name or an option that it does not have."""
    if name not in WAYS:
        raise UsageError("unknown way of combining", got=repr(name), expected=", ".join(WAYS), hint=nearest(name, WAYS))
    known = [*inspect.signature(WAYS[name]).parameters][1:]
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "none"
            raise UsageError(f"{name} has no such option", got=option, expected=takes, hint=nearest(option, known))
    return WAYS[name]


def share(value: float, name: str) -> float:
    """A number in (0, 1], or `UsageError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UsageError(f"{name} is a share", got=repr(value), expected="a number in (0, 1]")
    return float(value)
