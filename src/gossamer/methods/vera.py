"""VeRA: one frozen random pair of projections for all modules, and two trained vectors at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import AdapterFileError
from gossamer.kernels.routing import LinearChange
from gossamer.linalg import LowRankPair, all_zero
from gossamer.methods.base import LINEAR_KINDS, Base, Layer, Shape, wide
from gossamer.methods.factored import Rank
from gossamer.methods.peft import LAYERS, TARGETS, ConfigKey, PeftLayout, check_names, plain
from gossamer.methods.targeted import Names, Regex, TargetedMethod
from gossamer.spec import StrictFloat, StrictInt

_VECTORS = ("vera_lambda_b", "vera_lambda_d")
_SHARED = ("vera_A", "vera_B")


def _check(spec: VeRA, path: str, slots: Mapping[str, Tensor], where: str) -> None:
    """Two vectors a module, and two matrices for all of them."""
    if not path:
        got = {slot: tensor.ndim for slot, tensor in slots.items()}
        if got != dict.fromkeys(_SHARED, 2):
            raise AdapterFileError("the shared projections are two matrices", where=where, got=str(got))
        return
    check_names(slots, plain(*_VECTORS), where)
    got = tuple(slots["vera_lambda_d"].shape)
    if got != (spec.r,):
        what = "a vector that does not have the rank the config gives"
        raise AdapterFileError(what, where=where, got=str(got), expected=str((spec.r,)))


class VeRA(TargetedMethod):
    """Vector-based random matrix adaptation: one frozen random pair of matrices for all modules, two vectors at each.

    Equation:

        h = W x + b_vec * (B (d_vec * (A x)))        products with vectors entry by entry

    Shapes: A (r, most in) and B (most out, r) are random, frozen and shared by all modules, each of which uses the
    first `in` columns of A and the first `out` rows of B. Trained are d_vec (r,), which starts at `d_initial`, and
    b_vec (out,), which starts at zero, so the output is unchanged at the start: r + out numbers a module.

    Cost: 2 r (in + out) operations a token and module, as LoRA at that rank, and r is large here. A and B are held once
    for all modules and stored once in the file; `projection_seed` draws them again where a file leaves them out.

    Merge: exact, into `W' = W + diag(b_vec) B diag(d_vec) A`.

    When to use it: where very many adapters are kept, since each trains few numbers: the paper reports LoRA's results
    on GLUE with about a tenth of its trained parameters. Unmerged it is slower than LoRA at a small rank.

    Learning rate: `lr: auto` is thirty times LoRA's, the best of four as measured on SmolLM2-135M. The paper's is about
    ten times LoRA's; with d_vec at 0.1, b_vec has far to go, and ten times was not enough in a short run.

    Source: Kopiczko et al. 2023, arXiv:2310.11454, equation 2.
    """

    name: ClassVar[str] = "vera"
    lr_over_lora: ClassVar[float] = 30.0
    peft: ClassVar[PeftLayout | None] = PeftLayout(
        "VERA",
        slots=plain(*_VECTORS),
        whole_model={slot: f"base_model.{slot}" for slot in _SHARED},
        keys={
            "r": ConfigKey(256, "r"),
            "projection_prng_key": ConfigKey(0, "projection_seed"),
            "vera_dropout": ConfigKey(0.0, "dropout"),
            "d_initial": ConfigKey(0.1, "d_initial"),
            "save_projection": ConfigKey(True, write=lambda stored: "" in stored.adapter.tensors),
        },
        targeting=(*TARGETS, *LAYERS),
        assumed=("r",),
        descriptive={"fan_in_fan_out": False, "init_weights": True},
        refused={"bias": "none"},
        check=_check,
    )

    target_modules: Names | Regex = "all-linear"
    """List of path suffixes, one regular expression, or "all-linear": every linear module but the head."""
    r: Rank = 256
    """Rank of the shared projections."""
    d_initial: StrictFloat = 0.1
    """Start of every entry of d_vec."""
    projection_seed: StrictInt = 0
    """Seed of the shared projections; a file that holds none of them is read by drawing them again."""
    dropout: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input of A is zeroed in training."""

    def fits(self, shape: Shape) -> bool:
        return shape.kind in LINEAR_KINDS

    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_b": (shape.out_features,), "vera_lambda_d": (self.r,)}

    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "vera_lambda_b": torch.zeros(base.shape.out_features),
            "vera_lambda_d": torch.full((self.r,), self.d_initial),
        }

    def idle(self, path: str, slots: Mapping[str, Tensor]) -> bool:
        return sorted(slots) == [*_VECTORS] and any(all_zero(slots[name]) for name in _VECTORS)

    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        assert isinstance(common, Projections)
        return VeRALayer(shape, slots, common, self.dropout)

    def common(self, shapes: Sequence[Shape], stored: Mapping[str, Tensor]) -> nn.Module:
        """The projections: stored ones, or drawn from `projection_seed`. Raises `AdapterFileError`."""
        inner = max(shape.in_features for shape in shapes)
        outer = max(shape.out_features for shape in shapes)
        if not stored:
            generator = torch.Generator().manual_seed(self.projection_seed)
            return Projections(_random(self.r, inner, generator), _random(outer, self.r, generator))
        got = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        width, height = got.get("vera_A", (0, 0))[-1], got.get("vera_B", (0, 0))[0]
        if got != {"vera_A": (self.r, width), "vera_B": (height, self.r)} or width < inner or height < outer:
            raise AdapterFileError(
                "shared projections that do not fit the modules",
                got=str(got),
                expected=f"vera_A ({self.r}, {inner} or more), vera_B ({outer} or more, {self.r})",
            )
        return Projections(stored["vera_A"].detach().clone(), stored["vera_B"].detach().clone())


class Projections(nn.Module):
    """A (r, most in) and B (most out, r): constants, held once and saved once."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, inner: Tensor, outer: Tensor) -> None:
        super().__init__()
        self.register_buffer("vera_A", inner, persistent=False)
        self.register_buffer("vera_B", outer, persistent=False)


class VeRALayer(Layer):
    """The two vectors at one module, beside the projections of all."""

    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter

    def __init__(self, shape: Shape, slots: Mapping[str, Tensor], projections: Projections, dropout: float) -> None:
        super().__init__()
        for name, slot in slots.items():
            self.register_parameter(name, nn.Parameter(slot.detach().clone()))
        self.projections, self.dropout = projections, dropout
        self.inner, self.outer = shape.in_features, shape.out_features

    def common(self) -> dict[str, Tensor]:
        return dict(self.projections.named_buffers())

    def sliced(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this module."""
        return self.projections.vera_A[:, : self.inner], self.projections.vera_B[: self.outer]

    def pair(self) -> LowRankPair:
        """`diag(d_vec) A` and `diag(b_vec) B`, at least float32."""
        by_rank, by_row = (wide(vector.detach()) for vector in (self.vera_lambda_d, self.vera_lambda_b))
        inner, outer = (wide(factor).to(by_rank.device) for factor in self.sliced())
        return LowRankPair(by_rank[:, None] * inner, by_row[:, None] * outer)

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base(x, *args, **kwargs)
        inner, outer = (factor.to(x) for factor in self.sliced())
        x = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        down = nn.functional.linear(x, inner) * self.vera_lambda_d.to(x.dtype)
        return out + nn.functional.linear(down, outer) * self.vera_lambda_b.to(x.dtype)

    def linear_change(self, base: Base) -> LinearChange | None:
        return LinearChange(self.pair())

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": wide(current["weight"]) + self.pair().delta()}


def _random(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Kaiming's uniform values, of variance 2 / columns, float32: PEFT's own draw, so its seeds mean the same."""
    bound = 3**0.5 * (2**0.5 / columns**0.5)
    return torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
