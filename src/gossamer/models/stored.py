"""How much of a model is stored in few bits, and what is not and why."""

import warnings
from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.attachment.fitness import heads
from gossamer.attachment.walk import modules
from gossamer.models.quantizer import packed_modules

_EXPECTED = ("embeddings", "head", "norms, biases and other vectors")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class StorageReport:
    """What a model takes as it is stored.

    Attributes:
        modules: of those whose weight is packed. packed, packed_bytes: numbers in those weights, and bytes.
        dense: numbers that are not packed, by what they belong to, the most first. dense_bytes: of them all.
    """

    modules: int
    packed: int
    packed_bytes: int
    dense: dict[str, int]
    dense_bytes: int

    @property
    def total(self) -> int:
        """All numbers."""
        return self.packed + sum(self.dense.values())

    @property
    def nbytes(self) -> int:
        """All bytes."""
        return self.packed_bytes + self.dense_bytes

    @property
    def bits(self) -> float:
        """Of a number, over the whole model."""
        return 8 * self.nbytes / self.total

    @property
    def unexpected(self) -> dict[str, int]:
        """Dense matrices inside the layers, which a choice of 4 bits suggests to be packed."""
        return {kind: count for kind, count in self.dense.items() if kind not in _EXPECTED}

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} ({count / self.total:.0%})" for kind, count in self.dense.items())
        return f"{self.packed / self.total:.0%} of {self.total:,} parameters are packed; dense stay {kinds}"


def storage(model: nn.Module) -> StorageReport:
    """What a model's parameters are stored as; one that two modules share counts once."""
    packed, found = packed_modules(model), modules(model)
    outer = heads(model, found)
    dense: Counter[str] = Counter()
    seen: set[int] = set()
    nbytes = 0
    for path, module in found.items():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                dense[_kind(module, parameter, path in outer)] += parameter.numel()
                nbytes += parameter.nbytes
    return StorageReport(
        len(packed),
        sum(one.out_features * one.in_features for one in packed.values()),
        sum(one.packed.nbytes for one in packed.values()),
        dict(dense.most_common()),
        nbytes,
    )


def warn_if_mostly_dense(model: PreTrainedModel, quant: str) -> None:
    """Say it where more of the layers stays dense than is packed."""
    stored = storage(model)
    if sum(stored.unexpected.values()) > stored.packed:
        warnings.warn(f"quant={quant!r}: {stored}", stacklevel=3)


def _kind(module: nn.Module, parameter: Tensor, outer: bool) -> str:
    if parameter.ndim <= 1:
        return _EXPECTED[2]
    if isinstance(module, nn.Embedding):
        return _EXPECTED[0]
    if outer:
        return _EXPECTED[1]
    if isinstance(module, _CONVOLUTIONS):
        return "convolutions"
    if parameter.ndim > 2:
        return "experts that are stacked in one parameter"
    return f"matrices of {type(module).__name__}"
