"""Frozen linear maps of one input with their low-rank terms, and the decoder parts made of them, backwards written out.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T          all A_i stacked, so that x is read once for all of them

Kept for the backward is what cannot be made again cheaply: x, x A^T, and gate and up of a gated MLP. Norms and
activations are computed again; no cast, sum or scaled product is kept, and of a frozen weight there is no gradient.
The plain twins are `LowRankPair.apply` beside a linear module, and the layers of transformers' own models.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch gives no types for what autograd functions and its linear algebra return)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gossamer.kernels import elementwise
from gossamer.kernels.elementwise import ACTIVATIONS as ACTIVATIONS
from gossamer.linalg import LowRankPair


class AffineMap(Protocol):
    """A frozen linear map. One that is stored in few bits rebuilds its weight whenever it is asked."""

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in), and bias (out,) or None."""
        ...


class Term(NamedTuple):
    """A low-rank pair beside one map, for the rows `start..stop` of x."""

    pair: LowRankPair
    rows: tuple[int, int | None] = (0, None)


def linears(x: Tensor, maps: Sequence[AffineMap], terms: Sequence[Sequence[Term]]) -> tuple[Tensor, ...]:
    """`y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T` of each map.

    Args:
        x: (..., in), in the weights' dtype; products run in it, gradients of A and B arrive in theirs.
        terms: beside each of the maps; none where nothing is adapted, several where rows have different adapters.

    Returns:
        (..., out_i) each. Keeps x and (..., sum of ranks). Equals `LowRankPair.apply` beside each map.

    Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
    """
    return _beside(x, None, maps, terms)


def normed_linears(
    x: Tensor, norm: Norm, maps: Sequence[AffineMap], terms: Sequence[Sequence[Term]]
) -> tuple[Tensor, ...]:
    """`linears(rms_norm(x))`: keeps x, which the residual stream keeps anyway, and one number a row for the norm.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    return _beside(x, norm, maps, terms)


def _beside(
    x: Tensor, norm: Norm | None, maps: Sequence[AffineMap], terms: Sequence[Sequence[Term]]
) -> tuple[Tensor, ...]:
    group, factors = _split(maps, terms)
    outs: Any = _Linears.apply(x.flatten(0, -2), norm, group, *factors)
    return tuple(out.view(*x.shape[:-1], -1) for out in outs)


def gated_mlp(
    x: Tensor, norm: Norm, activation: str, maps: Sequence[AffineMap], terms: Sequence[Sequence[Term]]
) -> Tensor:
    """`x + down(act(gate(n)) * up(n))`, n = rms_norm(x): keeps x, gate and up.

    Args:
        activation: a name in `ACTIVATIONS`.
        maps, terms: of gate, up and down.

    Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """
    first, inner = _split(maps[:2], terms[:2])
    last, outer = _split(maps[2:], terms[2:])
    out = _GatedMLP.apply(x.flatten(0, -2), norm, activation, first, last, len(inner), *inner, *outer)
    return out.view_as(x)


# Norms and activations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """RMSNorm with a frozen weight: `weight * x / sqrt(mean(x^2) + eps)`; Gemma's is `(1 + weight)`, cast last."""

    weight: Tensor
    eps: float
    offset: bool = False

    def inverse(self, x: Tensor) -> Tensor:
        """`1 / sqrt(mean(x^2) + eps)`, (N, 1), at least float32."""
        return elementwise.rms_inverse(x, self.eps)

    def forward(self, x: Tensor, inverse: Tensor) -> Tensor:
        """The normed rows."""
        return elementwise.rms_forward(x, inverse, self.weight, self.offset)

    def backward(self, slope: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
        """`d x` from `d normed`: `inverse * (g - unit * mean(g * unit))`, with g the slope times the weight."""
        return elementwise.rms_backward(slope, x, inverse, self.weight, self.offset)


# Products ----------------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """One term among those of its rows: which map it is beside, and its columns of `x A^T`."""

    number: int
    scaling: float
    columns: slice


@dataclass(frozen=True)
class _Group:
    """Frozen maps that read the same input, and the terms beside them, those of the same rows together."""

    maps: Sequence[AffineMap]
    parts: Sequence[tuple[slice, Sequence[_Member]]]

    def forward(self, x: Tensor, factors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and of each part its rows of `x A^T`, (rows, sum of ranks)."""
        outs, downs = [nn.functional.linear(x, *one.affine()) for one in self.maps], []
        for rows, members, first, second in self._parts(factors):
            down = x[rows] @ _stacked(first, x).T
            for (index, scaling, columns), lora_B in zip(members, second, strict=True):
                outs[index][rows].addmm_(down[:, columns], lora_B.to(x.dtype).T, alpha=scaling)
            downs.append(down)
        return outs, downs

    def backward(
        self, slopes: Sequence[Tensor], x: Tensor, downs: Sequence[Tensor], factors: Sequence[Tensor], wanted: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """`d x`, if wanted, and the gradients of the factors in their order."""
        total = slopes[0] @ self.maps[0].affine()[0] if wanted else None
        for slope, one in zip(slopes[1:], self.maps[1:], strict=True):
            if total is not None:
                total.addmm_(slope, one.affine()[0])
        grads: list[Tensor] = []
        for (rows, members, first, second), down in zip(self._parts(factors), downs, strict=True):
            inner, outer = torch.empty_like(down), []
            for (index, scaling, columns), lora_B in zip(members, second, strict=True):
                slope = slopes[index][rows]
                wide = nn.functional.linear(
                    slope, lora_B.to(slope.dtype).T.contiguous()
                )  # in the layout BLAS is good at
                torch.mul(wide, scaling, out=inner[:, columns])
                outer.append((down[:, columns].T @ slope).T.mul(scaling).to(lora_B.dtype))
            stacked = (inner.T @ x[rows]).split([len(lora_A) for lora_A in first])
            for lora_A, for_A, for_B in zip(first, stacked, outer, strict=True):
                grads += [for_A.to(lora_A.dtype), for_B]
            if total is not None:
                total[rows].addmm_(inner, _stacked(first, x))
        return total, grads

    def _parts(
        self, factors: Sequence[Tensor]
    ) -> Iterator[tuple[slice, Sequence[_Member], Sequence[Tensor], Sequence[Tensor]]]:
        """The rows of each part, its terms, all its A and all its B."""
        end = 0
        for rows, members in self.parts:
            start, end = end, end + 2 * len(members)
            yield rows, members, factors[start:end:2], factors[start + 1 : end : 2]


def _split(maps: Sequence[AffineMap], terms: Sequence[Sequence[Term]]) -> tuple[_Group, list[Tensor]]:
    """Terms of the same rows side by side, and their factors in that order: tensors reach autograd one by one."""
    by_rows: dict[tuple[int, int | None], list[tuple[int, LowRankPair]]] = {}
    for index, beside in enumerate(terms):
        for pair, rows in beside:
            by_rows.setdefault(rows, []).append((index, pair))
    parts, factors = [], []
    for (start, stop), found in by_rows.items():
        members, end = [], 0
        for index, pair in found:
            members.append(_Member(index, pair.scaling, slice(end, end := end + pair.rank)))
            factors += [pair.lora_A, pair.lora_B]
        parts.append((slice(start, stop), members))
    return _Group(maps, parts), factors


def _stacked(first: Sequence[Tensor], x: Tensor) -> Tensor:
    """All A, one below the other, (sum of ranks, in)."""
    return torch.cat([*first]).to(x.dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm | None, group: _Group, *factors: Tensor) -> tuple[Tensor, ...]:
        inverse: Any = norm.inverse(x) if norm else None
        outs, downs = group.forward(norm.forward(x, inverse) if norm else x, factors)
        ctx.save_for_backward(x, inverse, *downs, *factors)
        ctx.norm, ctx.group = norm, group
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        x, inverse, *rest = ctx.saved_tensors
        norm, parts, wanted = ctx.norm, len(ctx.group.parts), ctx.needs_input_grad[0]
        normed = norm.forward(x, inverse) if norm else x
        inner, grads = ctx.group.backward(slopes, normed, rest[:parts], rest[parts:], wanted)
        del normed
        inner = norm.backward(inner, x, inverse) if norm and inner is not None else inner
        return inner, None, None, *grads


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm, activation: str, first: _Group, last: _Group, cut: int, *factors: Tensor
    ) -> Tensor:
        inverse = norm.inverse(x)
        (gate, up), downs = first.forward(norm.forward(x, inverse), factors[:cut])
        (out,), lows = last.forward(elementwise.gated(activation, gate, up), factors[cut:])
        ctx.save_for_backward(x, inverse, gate, up, *downs, *lows, *factors)
        ctx.norm, ctx.activation, ctx.first, ctx.last, ctx.cut = norm, activation, first, last, cut
        return out.add_(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        (slope,) = slopes
        x, inverse, gate, up, *rest = ctx.saved_tensors
        middle = len(ctx.first.parts)
        end = middle + len(ctx.last.parts)
        downs, lows, factors = rest[:middle], rest[middle:end], rest[end:]
        bent = elementwise.gated(ctx.activation, gate, up)  # again: cheaper than to keep it
        inner, outer_grads = ctx.last.backward(slopes, bent, lows, factors[ctx.cut :], True)
        del bent
        both = elementwise.gated_slopes(ctx.activation, inner, gate, up)
        del inner
        normed, wanted = ctx.norm.forward(x, inverse), ctx.needs_input_grad[0]
        inner, grads = ctx.first.backward(both, normed, downs, factors[: ctx.cut], wanted)
        del both, normed
        for_x = None if inner is None else ctx.norm.backward(inner, x, inverse).add_(slope)
        return for_x, None, None, None, None, None, *grads, *outer_grads
