"""Methods that train some of the model's own parameters whole: biases, normalisations, or all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.errors import AdapterFileError
from gossamer.methods.base import Base, Layer, Shape, wide
from gossamer.methods.peft import EXCLUDED, TARGETS, PeftLayout
from gossamer.methods.replacement import Replacement
from gossamer.methods.targeted import TargetedMethod

_MARK = "ln_tuning_layers."
"""How PEFT begins the names of a normalisation's own parameters."""


class Whole(TargetedMethod):
    """Trains copies `p'` of chosen parameters p, at least float32: the module runs with p' instead of p.

    They start as the parameters' own values, so the output is unchanged at the start. Merges exactly: p' is written in
    place of p. A parameter that the model stores once for two modules is trained, stored and counted once.
    """

    beside_calls: ClassVar[bool] = False

    @abstractmethod
    def trained(self, shape: Shape) -> list[str]:
        """Names of the module's parameters that are trained."""

    def fits(self, shape: Shape) -> bool:
        return bool(self.trained(shape))

    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        own = [name for name in sorted(self.trained(shape)) if name not in shape.tied]
        return {name: tuple(shape.parameters[name].shape) for name in own}

    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: wide(base.value(name).detach()) for name in self.expected(base.shape)}

    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        return Replacement(slots)


class BitFit(Whole):
    """Bias tuning: every bias of the model is trained, and nothing else.

    Equation:

        h = W x + b'

    Shapes: b' (out,) is a copy of the module's bias and starts as it, so the output is unchanged at the start. "auto"
    means every module with a bias: linear maps, convolutions, normalisations, the head. Trained are about 0.1% of a
    BERT; a model without biases (Llama, T5) is refused.

    Cost: none when the model runs: a module uses b' in place of b.

    Merge: exact, b' is written in place of b.

    When to use it: on encoders such as BERT with little data, where the paper finds it level with full fine-tuning, and
    as a small baseline. With more data LoRA goes further.

    Learning rate: `lr: auto` is LoRA's, by likeness to norms, whose vectors are of the same kind; it was not measured,
    because SmolLM2-135M, as every Llama, has no biases.

    Source: Ben Zaken et al. 2021, arXiv:2106.10199, section 3.
    """

    name: ClassVar[str] = "bitfit"
    lr_over_lora: ClassVar[float] = 1.0
    stands_at: ClassVar[str] = "modules with a bias"

    def trained(self, shape: Shape) -> list[str]:
        return [name for name in _floating(shape) if name.endswith("bias")]


def _check_norm(spec: NormTuning, path: str, slots: Mapping[str, Tensor], where: str) -> None:
    if not all(slot.startswith(_MARK) for slot in slots):
        raise AdapterFileError("a module trained in two ways", where=where, got=", ".join(slots))


class NormTuning(Whole):
    """Normalisation tuning: the gains and biases of every normalisation are trained, and nothing else.

    Equation:

        h = g' * normalised(x) + b'        without b' where the module has no bias

    Shapes: g' and b' (width,) are copies of the module's own and start as them, so the output is unchanged at the
    start. A normalisation is a module with "norm" in its class name and parameters of at most one dimension. Trained
    are one or two vectors a module.

    Cost: none when the model runs: a module uses g' and b' in place of its own.

    Merge: exact, g' and b' are written in place of the module's own.

    When to use it: to turn a model to another kind of input or style with very few numbers: the paper tunes language
    models to images with it. It can be had beside LoRA as well, with `modules_to_save`.

    Learning rate: `lr: auto` is LoRA's, as measured on SmolLM2-135M: a few vectors bear a larger step than whole
    matrices.

    Source: Zhao et al. 2023, arXiv:2312.11420, section 3.
    """

    name: ClassVar[str] = "norm"
    lr_over_lora: ClassVar[float] = 1.0
    stands_at: ClassVar[str] = "normalisation modules"
    peft: ClassVar[PeftLayout | None] = PeftLayout(
        "LN_TUNING", mark=_MARK, targeting=(*TARGETS, *EXCLUDED), check=_check_norm
    )

    def trained(self, shape: Shape) -> list[str]:
        names = _floating(shape)
        flat = all(shape.parameters[name].ndim <= 1 for name in names)
        return names if flat and "norm" in shape.class_name.lower() else []


class FullTuning(Whole):
    """Full fine-tuning: every parameter of the model is trained, through the same verbs as the adapters.

    Equation:

        W' = W + D        nothing is said about D

    Shapes: copies of all parameters, at least float32, stand beside the model, which keeps its own values. They start
    as the model's, so the output is unchanged at the start. A parameter that two modules share is trained and stored
    once.

    Cost: none in time beside a float32 base, but memory: the copies are as large as the model, AdamW holds two more
    numbers for each, and the file holds all of them.

    Merge: exact, the copies are written in place of the parameters.

    When to use it: as the baseline that adapters are measured against, and where the data are more than an adapter can
    hold and memory allows it.

    Learning rate: `lr: auto` is a twenty-fifth of LoRA's: 5e-5 at a hidden size of 576 and 1e-5 at 4,096, as models of
    those sizes are usually tuned. Schulman et al. 2025 have a tenth; on SmolLM2-135M that and three times that ended
    above each of 0.02, 0.03 and 0.04 in a short run.

    Source: the baseline of Hu et al. 2021, arXiv:2106.09685, equation 1.
    """

    name: ClassVar[str] = "full"
    lr_over_lora: ClassVar[float] = 0.04
    stands_at: ClassVar[str] = "modules with parameters"

    def trained(self, shape: Shape) -> list[str]:
        return _floating(shape)


def _floating(shape: Shape) -> list[str]:
    """The parameters that can be trained: numbers, not codes."""
    return [name for name, parameter in shape.parameters.items() if parameter.is_floating_point()]
