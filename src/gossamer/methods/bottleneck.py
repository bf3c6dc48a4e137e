"""Adapters of two small matrices with a nonlinearity between them, behind a module: Houlsby's and Lin's."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import UnsupportedError
from gossamer.linalg import all_zero
from gossamer.methods.base import LINEAR_KINDS, Base, Layer, Shape
from gossamer.methods.factored import Rank
from gossamer.methods.slots import hold
from gossamer.methods.targeted import TargetedMethod
from gossamer.spec import StrictFloat

Activation = Literal["relu", "gelu", "silu"]


class Bottleneck(TargetedMethod):
    """`h + up(act(down(h)))` behind the module that gives h; what Houlsby and Lin share."""

    dotted_slots: ClassVar[tuple[str, ...]] = ("down.bias", "down.weight", "up.bias", "up.weight")

    normed: ClassVar[bool] = False
    """Whether a layer normalisation of its own comes before `down`."""

    bottleneck: Rank = 64
    """Width between `down` and `up`."""
    activation: Activation
    """The nonlinearity between them."""
    dropout: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.0
    """Probability with which an activation between them is zeroed in training."""

    def fits(self, shape: Shape) -> bool:
        return shape.kind in LINEAR_KINDS

    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        width = shape.out_features
        found: dict[str, tuple[int, ...]] = {"down.bias": (self.bottleneck,), "down.weight": (self.bottleneck, width)}
        if self.normed:
            found |= {"norm.bias": (width,), "norm.weight": (width,)}
        return found | {"up.bias": (width,), "up.weight": (width, self.bottleneck)}

    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        slots = {name: torch.zeros(size) for name, size in self.expected(base.shape).items()}
        self.draw(slots["down.weight"], generator)
        if self.normed:
            slots["norm.weight"].fill_(1.0)
        return slots

    @abstractmethod
    def draw(self, down: Tensor, generator: torch.Generator) -> None:
        """Fill `down` (bottleneck, width) with its first values."""

    def idle(self, path: str, slots: Mapping[str, Tensor]) -> bool:
        return "up.weight" in slots and all_zero(slots["up.weight"]) and all_zero(slots["up.bias"])

    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        return BottleneckLayer(slots, self.activation, self.dropout)


class Houlsby(Bottleneck):
    """Houlsby adapters: a small network with a residual, behind the attention's and the feedforward's output.

    Equation:

        h' = h + up(act(down(h)))        h = W x + b, the output of the projection

    Shapes: down (bottleneck, width) starts normal with deviation 0.01, cut at two of them, as in section 3.6 of the
    paper; up (width, bottleneck) and both biases start at zero, so the output is unchanged at the start. Trained are 2
    width bottleneck + width + bottleneck numbers a module. GELU is what the authors' code uses.

    Cost: 4 width bottleneck operations a token and module, always, and they come after the module, not beside it:
    arXiv:2106.09685, table 1, gives 30% more time for a GPT-2 medium at a batch of one.

    Merge: refused: the nonlinearity has no equivalent weight.

    When to use it: to compare with the adapters of the paper, or where the change should not be linear in its input.
    For serving, a method that merges costs less.

    Learning rate: `lr: auto` is LoRA's, a rule of thumb for factors of about the same number; it was not swept here.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2.
    """

    name: ClassVar[str] = "houlsby"
    lr_over_lora: ClassVar[float] = 1.0
    roles = ("attention-output", "feedforward-output")

    activation: Activation = "gelu"

    def draw(self, down: Tensor, generator: torch.Generator) -> None:
        nn.init.trunc_normal_(down, std=0.01, a=-0.02, b=0.02, generator=generator)


class Lin(Bottleneck):
    """Adapters of Lin et al.: a layer normalisation and a small network, behind the feedforward's output only.

    Equation:

        h' = h + up(act(down(norm(h))))        h = W x + b, the output of the projection

    Shapes: norm is a layer normalisation of its own. down (bottleneck, width) starts uniform in +-1 / sqrt(width), for
    inputs of unit size; up (width, bottleneck) and both biases start at zero, so the output is unchanged at the start.
    Trained are 2 width bottleneck + 3 width + bottleneck numbers a module.

    Cost: 4 width bottleneck operations a token and module and the norm, always, after the module: arXiv:2106.09685,
    table 1, gives 21% more time for a GPT-2 medium at a batch of one.

    Merge: refused: the nonlinearity has no equivalent weight.

    When to use it: where Houlsby's adapters would do and half as many are enough: there is one a layer, not two. For
    serving, a method that merges costs less.

    Learning rate: `lr: auto` is LoRA's, as for Houlsby's.

    Source: Lin et al. 2020, arXiv:2004.03829, section 3 ("Adapter_L" of arXiv:2106.09685); the one place a layer also
    Pfeiffer et al. 2020, arXiv:2005.00247.
    """

    name: ClassVar[str] = "lin"
    lr_over_lora: ClassVar[float] = 1.0
    roles = ("feedforward-output",)
    normed = True
    dotted_slots = (*Bottleneck.dotted_slots, "norm.bias", "norm.weight")

    activation: Activation = "relu"

    def draw(self, down: Tensor, generator: torch.Generator) -> None:
        bound = down.shape[1] ** -0.5
        down.uniform_(-bound, bound, generator=generator)


class BottleneckLayer(Layer):
    """The small matrices behind one module; with a norm before them if there are slots for one."""

    def __init__(self, slots: Mapping[str, Tensor], activation: Activation, dropout: float) -> None:
        super().__init__()
        hold(self, slots)
        self.activation, self.dropout = getattr(nn.functional, activation), dropout

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        out = base(*args, **kwargs)
        own = {name: parameter.to(out.dtype) for name, parameter in self.named_parameters()}
        inner = out
        if "norm.weight" in own:
            inner = nn.functional.layer_norm(out, out.shape[-1:], own["norm.weight"], own["norm.bias"])
        inner = self.activation(nn.functional.linear(inner, own["down.weight"], own["down.bias"]))
        inner = nn.functional.dropout(inner, self.dropout, self.training) if self.dropout else inner
        return out + nn.functional.linear(inner, own["up.weight"], own["up.bias"])

    def neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        """Ones for the gain of the norm, as where it starts."""
        own = dict(self.named_parameters())
        return {"norm.weight": torch.ones_like(own["norm.weight"].detach())} if "norm.weight" in own else {}

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise UnsupportedError(
            "an adapter with a nonlinearity has no equivalent weight, so it cannot be merged",
            hint="keep it beside the model, or use LoRA",
        )
