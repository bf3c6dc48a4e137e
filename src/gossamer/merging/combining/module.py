"""What a way of combining sees: the weighted changes of one matrix. And the table of the ways."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import UsageError, nearest
from gossamer.linalg import LowRankPair


@dataclass(frozen=True)
class Matrix:
    """What is combined: the changes of one matrix by all adapters that have one there, in their order.

    Attributes:
        path: of the matrix.
        pairs: each adapter's, in one dtype of at least float32.
        weights: how much of each is wanted.
        generator: seeded from `seed` and the path, so that the order of modules does not matter.
    """

    path: str
    pairs: Sequence[LowRankPair]
    weights: Sequence[float]
    generator: torch.Generator

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.pairs[0].shape

    @property
    def rank(self) -> int:
        """Rank of the exact sum: that of all changes together, as far as the matrix has it."""
        return min(sum(pair.rank for pair in self.pairs), *self.shape)

    def deltas(self) -> Iterator[tuple[float, Tensor]]:
        """Each adapter's weight and whole change, (out, in), one at a time."""
        return ((weight, pair.delta()) for weight, pair in zip(self.weights, self.pairs, strict=True))

    def sum(self) -> LowRankPair:
        """The weighted sum: factors side by side."""
        scaled = [pair.scaled(weight) for weight, pair in zip(self.weights, self.pairs, strict=True)]
        return LowRankPair.concatenated(scaled)


Result = Tensor | LowRankPair
"""The combined change: whole (out, in), or a pair."""
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
