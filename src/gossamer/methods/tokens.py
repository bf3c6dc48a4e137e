"""Rows of an embedding that are trained whole, while the rest of it stays frozen: new tokens, most of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.methods.base import Base, wide
from gossamer.methods.replacement import ParameterLayer

SLOT = "trainable_tokens_delta"
"""PEFT's name for the rows; they are the rows' values, not a difference."""


class TokenRows(ParameterLayer):
    """`E[rows] = trained`, (n, dim), at an embedding; and at a head that is tied to it, where it borrows the rows.

    Only the n rows are stored. The embedding itself is not copied: the frozen output is computed, and the places where
    one of the rows was looked up (in a head, its logits) take their values from the trained ones.
    """

    rows: Tensor
    place: Tensor

    def __init__(self, indices: Sequence[int], count: int, values: Tensor | TokenRows) -> None:
        super().__init__()
        self.owner: tuple[TokenRows, ...] = ()  # in a tuple, so that torch does not count the rows twice
        if isinstance(values, TokenRows):
            self.owner = (values,)
        else:
            self.register_parameter(SLOT, nn.Parameter(values.detach().clone()))
        place = torch.full((count,), -1, dtype=torch.long)
        place[list(indices)] = torch.arange(len(indices))
        self.register_buffer("rows", torch.tensor(indices, dtype=torch.long), persistent=False)
        self.register_buffer("place", place, persistent=False)

    @property
    def values(self) -> Tensor:
        """The trained rows, (n, dim)."""
        return (self.owner[0] if self.owner else self).get_parameter(SLOT)

    def replaces(self) -> list[str]:
        return ["weight"]

    def neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        """The embedding's own rows."""
        return {} if self.owner else {SLOT: base.value("weight").detach()[self.rows]}

    def presented(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = parameters["weight"]
        return dict(parameters) | {"weight": weight.index_copy(0, self.rows, self.values.to(weight.dtype))}

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": self.presented({"weight": wide(current["weight"])})["weight"].detach()}

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base(x, *args, **kwargs)
        values = self.values.to(out.dtype)
        if base.shape.kind == "embedding":
            place = self.place[x]
            trained = base.mapped(place.clamp(min=0), values.T)
            return torch.where((place >= 0)[..., None], trained, out)
        trained = base.mapped(x, values)
        bias = base.bias()
        trained = trained if bias is None else trained + bias[self.rows]
        return out.index_copy(-1, self.rows, trained)
