"""LoRA: `h = W x + scaling * B A x`, W frozen. Source: Hu et al. 2021, arXiv:2106.09685, equation 3."""

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.adapter import Method, Tensors
from gossamer.errors import StateError, UnsupportedError
from gossamer.linalg import all_zero
from gossamer.methods.base import AFFINE_KINDS, Base, Layer, Shape, wide
from gossamer.methods.doubled import FACTORS, as_plain
from gossamer.methods.factored import Factored, change_of, factors_in
from gossamer.methods.lora_layers import LoRALayer, MatrixLoRA
from gossamer.methods.lora_peft import lora_layout
from gossamer.methods.pairs import StoredPair, added, only_factors, pairs_of, shrunk, slots_of
from gossamer.methods.peft import PeftLayout
from gossamer.methods.targeted import exactly


class LoRA(Factored):
    """Low-rank adaptation: beside each frozen weight stands the product of two thin trained matrices.

    Equation:

        h = W x + scaling * B A x        scaling = alpha / r        ("rslora": alpha / sqrt(r))

    Shapes: A (r, in) starts random and B (out, r) at zero, so the output is unchanged at the start. Trained are
    r (in + out) numbers a module, instead of in * out. An embedding's A is (r, rows); a convolution's A is
    (r, in, *kernel) and its B (out, r, 1...); stacked experts have an A and a B each. A start made of the weight keeps
    its first factors A0, B0 as constants: `h = W x + scaling * (B A - B0 A0) x`.

    Cost: beside the model 2 r (in + out) operations a token and module, where the frozen product costs 2 in * out.
    AdamW holds two more numbers for each trained one, and nothing for W. Merged it costs nothing.

    Merge: exact, into `W' = W + scaling * B A`, computed in float32 and rounded once. Refused where no weight says the
    same: a convolution with groups, an embedding whose max_norm would cut the merged rows, and a weight that another
    module shares. As values, adapters add exactly: factors are concatenated and ranks add.

    When to use it: first. Other tools read its files, and merged it is as fast as the base. Every linear module at a
    small rank is a better use of parameters than the attention alone at a large one, and the best learning rate is
    about ten times that of full fine-tuning. "rslora" keeps the update's size as r grows, for ranks of 64 and more.
    What an adapter can hold is bounded by its size: where the loss stalls above full fine-tuning's, raise r.

    Learning rate: `lr: auto` is `5e-4 (2000 / hidden) ** 0.781`, with 0.0775 for Qwen, from Schulman et al. 2025: about
    ten times full fine-tuning's, and one for all ranks where scaling is alpha / r and alpha near 32. The update grows
    with alpha, and under "rslora" with sqrt(r) besides: where that is far from it, set the rate yourself.

    Source: Hu et al. 2021, arXiv:2106.09685, equation 3; scaling "rslora": Kalajdzievski 2023, arXiv:2312.03732;
    starts: Meng et al. 2024, arXiv:2404.02948 (PiSSA), Buyukakyuz 2024, arXiv:2406.01775 (OLoRA). Targets, learning
    rate and capacity: Schulman et al. 2025, "LoRA Without Regret".
    """

    name: ClassVar[str] = "lora"
    lr_over_lora: ClassVar[float] = 1.0
    peft: ClassVar[PeftLayout | None] = lora_layout()

    def fits(self, shape: Shape) -> bool:
        return shape.kind in AFFINE_KINDS or bool(shape.matrices)

    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return self.factor_slots(shape)

    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        return self.factor_values(base, generator)

    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        if shape.matrices:
            scalings = {name: self.scaling_at(f"{shape.path}.{name}") for name in shape.matrices}
            return MatrixLoRA(slots, scalings, shape.transposed)
        return LoRALayer(shape, slots, self.scaling_at(shape.path), self.dropout)

    def delta(self, path: str, slots: Mapping[str, Tensor]) -> Tensor:
        factors = factors_in(slots)
        if factors is None:
            raise UnsupportedError(
                "no factors of one matrix: what was trained whole needs the base's own value",
                where=path,
                got=str([*slots]),
            )
        starts = [(slots["start_A"], slots["start_B"])] if "start_A" in slots else []
        return change_of((factors, *starts), self.scaling_at(path))

    def idle(self, path: str, slots: Mapping[str, Tensor]) -> bool:
        if any(slot.rpartition(".")[2] not in FACTORS and not slot.startswith("start_") for slot in slots):
            return False  # a bias that is trained whole may be the base's own or not
        if "start_A" in slots:
            pair = factors_in(slots)
            return pair is not None and all(map(torch.equal, pair, (slots["start_A"], slots["start_B"])))
        inners = [slot for slot in slots if slot.endswith("_A")]
        return all(all_zero(slots[f"{inner[:-1]}B"]) or all_zero(slots[inner]) for inner in inners)

    def scaled(self, tensors: Tensors, weight: float) -> tuple[Method, Tensors]:
        only_factors(tensors)
        plain, tensors = as_plain(self, tensors)
        return plain, {
            path: {name: wide(slot) * weight if name.endswith("_B") else slot for name, slot in slots.items()}
            for path, slots in tensors.items()
        }

    def summed(self, tensors: Tensors, other: Method, other_tensors: Tensors) -> tuple[Method, Tensors]:
        if not isinstance(other, LoRA):
            raise UnsupportedError("only LoRA adapters can be added to a LoRA adapter", got=other.name)
        mine, theirs = pairs_of(self, tensors), pairs_of(other, other_tensors)
        total: dict[str, StoredPair] = {}
        for place in sorted({*mine, *theirs}):
            parts = [pairs[place] for pairs in (mine, theirs) if place in pairs]
            if len({part.form for part in parts}) > 1:
                forms = " and ".join(str(part.form) for part in parts)
                raise StateError("weights of different shapes have no sum", where=place, got=forms)
            total[place] = added(parts)
        return unit_scaled(total), slots_of(total)

    def resized(
        self, tensors: Tensors, r: int | None, energy: float | None, pooled: bool
    ) -> tuple[Method, Tensors, dict[str, float], float]:
        before = pairs_of(self, tensors)
        after, errors, error = shrunk(before, r, energy, pooled)
        if all(after[place] is before[place] for place in before):
            return self, tensors, errors, error
        return unit_scaled(after), slots_of(after), errors, error


def unit_scaled(pairs: Mapping[str, StoredPair]) -> LoRA:
    """The spec of pairs with their scaling in the factors: each at its own rank, every scaling exactly 1."""
    ranks = {place: stored.pair.rank for place, stored in pairs.items()}
    common = max(ranks.values(), key=list(ranks.values()).count, default=1)
    others = {f"^{re.escape(place)}": rank for place, rank in ranks.items() if rank != common}
    return LoRA(
        r=common,
        alpha=float(common),
        target_modules=exactly(place for place, pair in pairs.items() if not pair.parameter),
        target_parameters=tuple(place for place, pair in pairs.items() if pair.parameter),
        rank_pattern=others,
        alpha_pattern={pattern: float(rank) for pattern, rank in others.items()},
    )
