"""IA3: activations are scaled by learned vectors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.errors import TargetError
from gossamer.kernels.routing import LinearChange
from gossamer.methods.base import LINEAR_KINDS, Base, Layer, Shape, wide
from gossamer.methods.peft import EXCLUDED, TARGETS, ConfigKey, PeftLayout, Stored, listed, plain
from gossamer.methods.roles import role_of
from gossamer.methods.targeted import Names, Regex, TargetedMethod, exactly

SLOT = "ia3_l"


def _feedforward(stored: Stored) -> Any:
    if not stored.resolved:
        return listed(stored.spec.feedforward_modules)
    return listed(exactly(filter(stored.spec.scales_input, stored.targets)))


def _resolved(spec: IA3) -> bool:
    """PEFT wants its list of feedforward modules to be a part of its list of targets, entry by entry."""
    outputs, targets = spec.feedforward_modules, spec.target_modules
    both = isinstance(outputs, tuple) and isinstance(targets, tuple)
    return outputs == "auto" or (both and not {*outputs} <= {*targets})


class IA3(TargetedMethod):
    """Infused adapter by inhibiting and amplifying inner activations: what flows through a module is scaled.

    Equation:

        h = l * (W x + b)        keys, values, a fused projection; any other module
        h = W (l * x) + b        modules of `feedforward_modules`

    Shapes: l is (out, 1), or (1, in) where the input is scaled; beside a convolution (1, channels, 1...). It starts at
    ones, so the output is unchanged at the start. Trained are out, or in, numbers a module.

    Cost: one product an entry of the output, or of the input, in float32 beside a narrower base.

    Merge: exact, into `W' = l W, b' = l b`, row by row, or `W' = W l`, column by column.

    When to use it: with few examples and very many tasks: the paper learns from some tens of rows a task, and one
    adapter is a few vectors. It can only scale what the model already computes; for more, use LoRA.

    Learning rate: `lr: auto` is six times LoRA's, which at a hidden size of 2,048 is the paper's 3e-3; the best of
    three as measured on SmolLM2-135M.

    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.
    """

    name: ClassVar[str] = "ia3"
    lr_over_lora: ClassVar[float] = 6.0
    peft: ClassVar[PeftLayout | None] = PeftLayout(
        "IA3",
        slots=plain(SLOT),
        keys={"feedforward_modules": ConfigKey(None, "feedforward_modules", write=_feedforward)},
        targeting=(*TARGETS, *EXCLUDED),
        descriptive={"fan_in_fan_out": False, "init_ia3_weights": True},
        resolved=_resolved,
    )
    roles = ("key", "value", "fused", "feedforward-output")

    feedforward_modules: Names | Regex = "auto"
    """Those of the targets whose input is scaled: path suffixes, one regular expression, or "auto", told by name."""

    def fits(self, shape: Shape) -> bool:
        return shape.kind in (*LINEAR_KINDS, "conv")

    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        scales_input = self.scales_input(shape.path)
        size = shape.in_features if scales_input else shape.out_features
        if shape.kernel:
            return {SLOT: (1, size, *(1 for _ in shape.kernel))}
        return {SLOT: (1, size) if scales_input else (size, 1)}

    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        return {SLOT: torch.ones(self.expected(base.shape)[SLOT])}

    def idle(self, path: str, slots: Mapping[str, Tensor]) -> bool:
        return [*slots] == [SLOT] and bool((slots[SLOT] == 1).all())

    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        return IA3Layer(shape, slots[SLOT], self.scales_input(shape.path))

    def check(self, shapes: Sequence[Shape]) -> None:
        pattern = self.feedforward_modules
        entries = pattern if isinstance(pattern, tuple) else (pattern,) if pattern != "auto" else ()
        for entry in entries:
            if not any(_names(entry, shape.path, isinstance(pattern, str)) for shape in shapes):
                paths = ", ".join(shape.path for shape in shapes[:4])
                raise TargetError("feedforward_modules names no target", got=repr(entry), expected=f"among {paths} ...")

    def scales_input(self, path: str) -> bool:
        """Whether the module at `path` is a feedforward one, whose input is scaled instead of its output."""
        pattern = self.feedforward_modules
        if pattern == "auto":
            return role_of(path) == "feedforward-output"
        if isinstance(pattern, str):
            return _names(pattern, path, True)
        return any(_names(entry, path, False) for entry in pattern)


class IA3Layer(Layer):
    """The vector at one module, before its call or after it."""

    ia3_l: nn.Parameter

    def __init__(self, shape: Shape, slot: Tensor, scales_input: bool) -> None:
        super().__init__()
        self.register_parameter(SLOT, nn.Parameter(slot.detach().clone()))
        self.scales_input, self.groups, self.ones = scales_input, shape.groups, (1,) * len(shape.kernel)

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = self.ia3_l.reshape(-1, *self.ones)  # channels come last, except beside a convolution
        if self.scales_input:
            return base((x * scale).to(x.dtype), *args, **kwargs)
        out = base(x, *args, **kwargs)
        return (out * scale).to(out.dtype)

    def linear_change(self, base: Base) -> LinearChange | None:
        if base.shape.kind not in LINEAR_KINDS:
            return None
        vector = wide(self.ia3_l.detach()).flatten()
        return LinearChange(given=vector) if self.scales_input else LinearChange(gain=vector)

    def neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        """Ones: a factor of 0 would silence the module."""
        return {SLOT: torch.ones_like(self.ia3_l.detach())}

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight, scale = wide(current["weight"]), wide(self.ia3_l.detach())
        if self.scales_input:  # an output channel of a convolution sees the inputs of its own group
            by_column = scale.reshape(self.groups, 1, -1, *self.ones)
            return {"weight": (weight.unflatten(0, (self.groups, -1)) * by_column).flatten(0, 1)}
        folded = {"weight": weight * scale.reshape(-1, 1, *self.ones)}
        return folded | ({"bias": current["bias"] * scale.flatten()} if "bias" in current else {})


def _names(entry: str, path: str, expression: bool) -> bool:
    """Whether a regular expression covers the path, or a suffix ends it."""
    return bool(re.fullmatch(entry, path)) if expression else path == entry or path.endswith(f".{entry}")
