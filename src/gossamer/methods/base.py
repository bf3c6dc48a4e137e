"""The protocol between a method and a module.

An adapter layer sees its base through a few questions only: call it, ask for its weight and bias, send an input
through its own linear map with another weight. So no method knows how a weight is stored, and methods x storages
becomes methods + storages.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from gossamer.kernels.routing import LinearChange
from gossamer.linalg import LowRankPair

LINEAR_KINDS = ("linear", "conv1d")
"""Kinds whose map is one matrix product."""
AFFINE_KINDS = (*LINEAR_KINDS, "embedding", "conv")
"""Kinds with one weight that `affine` gives and `mapped` can stand another one in for."""


@dataclass(frozen=True)
class Shape:
    """What a method may know of a module before it makes a layer for it.

    Attributes:
        path: canonical path; "" is the whole model.
        kind: "linear"; "conv1d" (GPT-2's transposed linear); "embedding", a linear map of one-hot rows, so that
            in_features is the number of rows; "conv" (1 to 3 dimensions); "experts" and "attention", which use their
            `matrices` without calling anything; "model", a transformers decoder; or "" for all others.
        class_name: of the module.
        out_features, in_features: of the affine map; 0 where there is none.
        parameters: its direct parameters, by name; of an "attention" also those of its `out_proj`.
        kernel, groups: of a convolution.
        matrices: of "experts" and "attention": parameter name -> (experts, out, in).
        transposed: whether those matrices are stored as (experts, in, out).
        tied: its parameters that are stored in another selected module: name -> (that module's path, name there).
        config, embeddings: of a "model", its transformers config and its input embeddings, (rows, hidden).
    """

    path: str
    kind: str
    class_name: str
    out_features: int
    in_features: int
    parameters: Mapping[str, Tensor]
    kernel: tuple[int, ...] = ()
    groups: int = 1
    matrices: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    transposed: bool = False
    tied: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    config: Any = None
    embeddings: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where its first parameter is."""
        known = self.parameters.values() if self.embeddings is None else (self.embeddings,)
        return next((parameter.device for parameter in known), torch.device("cpu"))


class Base(Protocol):
    """The frozen module beside which an adapter layer stands."""

    @property
    def shape(self) -> Shape:
        """What it is."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as it is."""
        ...

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Its weight (out, in, *kernel) and bias (out,) or None, in the module's own dtype."""
        ...

    def bias(self) -> Tensor | None:
        """The bias alone: a weight may have to be rebuilt to be looked at."""
        ...

    def is_plain(self) -> bool:
        """Whether calling it is exactly `x W^T + b` with its own frozen weight, and nothing stands in between."""
        ...

    def version(self) -> tuple[int, int]:
        """What changes when the stored weight does."""
        ...

    def mapped(self, x: Tensor, weight: Tensor) -> Tensor:
        """The module's linear map with `weight` (rows, in, *kernel) in place of its own, and no bias.

        Strides, dilation, padding and an embedding's scale are the module's; a convolution's groups are 1.
        """
        ...

    def checkpointed(self) -> bool:
        """Whether parts of it run a second time in the backward, which switches key-value caches off."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Its direct parameters as stored, or as the layers further in present them.

        A weight that is stored in few bits is present in outline: shape and dtype, and NaN for numbers.
        """
        ...

    def value(self, name: str) -> Tensor:
        """One of the frozen module's direct parameters in numbers, as stored or rebuilt."""
        ...

    def with_parameters(self, replaced: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the module with some of its direct parameters replaced for this one call."""
        ...


class Layer(nn.Module):
    """One adapter at one module. Its parameters and persistent buffers are its slots."""

    innermost: ClassVar[bool] = False
    """Whether it stands for parameters of the module itself, so that layers of other adapters go around it."""

    @abstractmethod
    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        """The adapted output; `base(*args, **kwargs)` is the frozen one."""

    @abstractmethod
    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that change when this layer is folded in, at least float32, or `UnsupportedError`.

        Args:
            current: the module's direct parameters with earlier layers folded in; a "weight" of an affine map as
                (out, in, *kernel), unless the layer is an innermost one, which sees parameters as they are stored.
            frozen: the same as stored in the base.
        """

    def merged_rows(self, weight: Tensor, rows: slice) -> Tensor | None:
        """`weight`, a copy of those rows of a linear module's, with this layer folded in, maybe in place.

        None, and the copy as it was, where the layer changes more than such rows.
        """
        return None

    def replaces(self) -> list[str]:
        """Parameters of the module that have another value with this layer, whatever they were."""
        return []

    def slots(self) -> dict[str, Tensor]:
        """Slot name -> tensor, sorted: what is saved. Buffers among them are constants of the adapter."""
        return dict(sorted(self.state_dict(keep_vars=True).items())) if self._modules else self._own_slots()

    def _own_slots(self) -> dict[str, Tensor]:
        """The same of a layer without parts; hundreds of layers are asked, and torch's way takes its time."""
        kept = {name: buffer for name, buffer in self._buffers.items() if name not in self._non_persistent_buffers_set}
        return {name: slot for name, slot in sorted({**self._parameters, **kept}.items()) if slot is not None}

    def plain_pair(self) -> LowRankPair | None:
        """The layer as a low-rank pair beside a plain linear map, where that is all it is: what can be fused."""
        return None

    def linear_change(self, base: Base) -> LinearChange | None:
        """What the layer makes of a linear map, as vectors and factors that rows of a batch may differ in.

        None where it is more than that, or stands at something else; then rows of different adapters run one by one.
        """
        return None

    def neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        """Slot -> the value that weight decay pulls it towards, so that decay leads back to the base's own output.

        Zero for slots that are left out, which suits factors: a product of which one is zero changes nothing. None:
        no value of the slot changes nothing, so it is not decayed.
        """
        return {}

    def common(self) -> dict[str, Tensor]:
        """Tensors that all layers of the adapter share, saved once, under the path ""."""
        return {}


def wide(tensor: Tensor) -> Tensor:
    """At least float32: what is trained and what deltas are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
