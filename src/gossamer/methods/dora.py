"""DoRA: a weight's rows are scaled by a trained magnitude, their direction moved by LoRA."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.errors import UnsupportedError
from gossamer.kernels import fused
from gossamer.kernels.routing import LinearChange
from gossamer.linalg import LowRankPair
from gossamer.methods.base import AFFINE_KINDS, LINEAR_KINDS, Base, Layer, Shape, wide
from gossamer.methods.factored import Factored
from gossamer.methods.lora_layers import FactorLayer
from gossamer.methods.lora_peft import MAGNITUDE, lora_layout
from gossamer.methods.peft import PeftLayout
from gossamer.methods.replacement import bias_shift


class DoRA(Factored):
    """Weight-decomposed low-rank adaptation: LoRA turns the rows of the weight, a trained magnitude sets their length.

    Equation:

        h = m (W + D) x / ||W + D|| + b        D = scaling * B A        norms and products row by row

    Shapes: m (out,) starts as the norms ||W|| of the rows of W, A (r, in) random, B (out, r) at zero, so the output is
    unchanged at the start. Trained are r (in + out) + out numbers a module.

    Cost: that of LoRA and the norm, which is never computed from the (out, in) sum:

        ||W + D||^2 = ||W||^2 + 2 scaling <B, W A^T> + scaling^2 <B A A^T, B>

    ||W||^2 is kept, so the norm costs about as much as r more tokens. It is a constant in the backward, as in section
    4.3 of the paper.

    Merge: exact, into `W' = m (W + D) / ||W + D||`, row by row; refused where LoRA's merge is. A convolution with
    groups has no such norm and is refused. Two of them have no sum as values, since each divides by its own norm; on a
    model they stack.

    When to use it: where LoRA at a small rank stays short of full fine-tuning and the merged model is what runs. The
    paper finds it ahead of LoRA at ranks 4 to 64, most clearly below 8. Use plain LoRA where adapters are to be added,
    or served unmerged by a program that does not know DoRA.

    Learning rate: `lr: auto` is LoRA's: the factors are LoRA's, and the magnitudes start where they belong.

    Source: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """

    name: ClassVar[str] = "dora"
    lr_over_lora: ClassVar[float] = 1.0
    peft: ClassVar[PeftLayout | None] = lora_layout(dora=True)

    def fits(self, shape: Shape) -> bool:
        return shape.kind in AFFINE_KINDS

    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        if shape.groups > 1:
            raise UnsupportedError(
                "DoRA needs the norms of W + B A, and at a convolution with groups no weight says what B A does",
                where=shape.path,
                got=f"{shape.groups} groups",
                hint="leave it out with exclude_modules, or use LoRA there",
            )
        magnitude = (1, shape.out_features, *(1 for _ in shape.kernel)) if shape.kernel else (shape.out_features,)
        return dict(sorted((self.factor_slots(shape) | {MAGNITUDE: magnitude}).items()))

    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        magnitude = squared_norms(base).sqrt().reshape(self.expected(base.shape)[MAGNITUDE])
        return self.factor_values(base, generator) | {MAGNITUDE: magnitude}

    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        return DoRALayer(shape, slots, self.scaling_at(shape.path), self.dropout)


class DoRALayer(FactorLayer):
    """Factors and magnitude at one module."""

    known: tuple[tuple[int, int], Tensor] | None = None
    """||W||^2 and the storage and version of the W that it is of."""

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base(x, *args, **kwargs)
        bias = base.bias()
        ratio = self.get_parameter(MAGNITUDE).flatten() / self._norms(base)
        kernel = len(base.shape.kernel)
        if base.shape.kind in LINEAR_KINDS and "start_A" not in self._buffers and out.ndim > 1:
            dropped = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
            pair = self.pair
            out = fused.dora(out, base.mapped(dropped, pair.lora_A.to(x.dtype)), pair.lora_B, ratio, bias, pair.scaling)
        else:  # a convolution's channels stand before its places
            out, term = (part.movedim(-1 - kernel, -1) for part in (out, self.term(base, x)))
            out = fused.plain_dora(out, term, ratio, bias).movedim(-1, -1 - kernel)
        if "bias" in self._parameters:
            shift = bias_shift(self.bias, base).to(out.dtype)
            out = out + shift.reshape(-1, *(1 for _ in range(kernel)))
        return out

    @torch.no_grad()
    def linear_change(self, base: Base) -> LinearChange | None:
        found = self.factor_change(base)
        if found is None or found.pair is None:
            return None
        ratio, bias = wide(self.get_parameter(MAGNITUDE).detach()) / self._norms(base), base.bias()
        shift = found.shift if bias is None else (1 - ratio) * bias + (0.0 if found.shift is None else found.shift)
        pair = found.pair.folded()
        return LinearChange(LowRankPair(pair.lora_A, ratio[:, None] * pair.lora_B), gain=ratio, shift=shift)

    def neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        """The magnitude is pulled to the norms of the rows of W."""
        magnitude = squared_norms(base).sqrt().reshape(self.get_parameter(MAGNITUDE).shape)
        return {**self.factor_neutral(base), MAGNITUDE: magnitude}

    @torch.no_grad()
    def _norms(self, base: Base) -> Tensor:
        """||W + D|| by rows, (out,), at least float32."""
        weight = base.affine()[0]
        key = base.version()
        if self.known is None or self.known[0] != key:
            self.known = (key, squared_norms(base))
        matrix = wide(weight).flatten(1)
        return _never_zero((self.known[1] + self._growth(matrix)).clamp(min=0).sqrt())

    def _growth(self, matrix: Tensor) -> Tensor:
        """`||W + D||^2 - ||W||^2`; exactly zero while the factors are those that their start subtracts."""
        flat = [
            (sign, pair.lora_A.flatten(1).to(matrix.dtype), pair.lora_B.flatten(1).to(matrix.dtype))
            for sign, pair in zip((1.0, -1.0), self.pairs, strict=False)
        ]
        cross: Any = sum(sign * (outer * (matrix @ inner.T)).sum(1) for sign, inner, outer in flat)
        square: Any = sum(
            sign * other * ((outer @ (inner @ inner2.T)) * outer2).sum(1)
            for sign, inner, outer in flat
            for other, inner2, outer2 in flat
        )
        return 2 * self.scaling * cross + self.scaling**2 * square

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        change, weight = self.change(), wide(frozen["weight"])
        norms = _never_zero((weight + change).flatten(1).square().sum(1).sqrt())
        ratio = wide(self.get_parameter(MAGNITUDE).detach()).flatten() / norms
        by_row = ratio.reshape(-1, *(1 for _ in weight.shape[1:]))
        moved = wide(current["weight"]) + change
        folded = {"weight": moved + (by_row - 1) * moved}
        if "bias" in current:
            shift = ratio * (current["bias"] - frozen["bias"])
            own = self.bias.detach() - frozen["bias"] if "bias" in self._parameters else 0
            folded["bias"] = frozen["bias"] + shift + own
        return folded


def squared_norms(base: Base) -> Tensor:
    """||W||^2 by rows, (out,), at least float32."""
    return wide(base.affine()[0].detach()).flatten(1).square().sum(1)


def _never_zero(norms: Tensor) -> Tensor:
    """A row of zeros (pruned, or rounded away in 4 bits) has magnitude and norm 0, and 0 / 0 would be NaN."""
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)
