"""The protocol between a method and a module.

An adapter layer sees its base through two things only: it can call it, and it can ask for its weight and bias. So no
method knows how a weight is stored, and methods x storages becomes methods + storages.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from gossamer import adapter
from gossamer.spec import Indices, Names, StrictInt, StrictStr


class Base(Protocol):
    """The frozen module beside which an adapter layer stands."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as it is."""
        ...

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Its weight (out, in) and bias (out,) or None, in the module's own dtype."""
        ...

    def with_parameters(self, replaced: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the module with some of its direct parameters replaced for this one call."""
        ...


@dataclass(frozen=True)
class Shape:
    """What a method may know of a module before it makes a layer for it.

    Attributes:
        path: canonical path.
        kind: "linear", "conv1d" or "" for a module that only its parameters describe.
        in_features, out_features: of the affine map; 0 where there is none.
        parameters: its direct parameters, by name.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    parameters: Mapping[str, Tensor]


class Layer(nn.Module):
    """One adapter at one module. Its direct parameters are its slots."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        """The adapted output; `base(*args, **kwargs)` is the frozen one."""
        raise NotImplementedError

    @abstractmethod
    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that change when this layer is folded in, at least float32.

        Args:
            current: the module's direct parameters with earlier layers folded in; a "weight" of an affine map as
                (out, in), unless the layer is a `Replacement`.
            frozen: the same as stored in the base.
        """

    def slots(self) -> dict[str, nn.Parameter]:
        """Slot name -> parameter, sorted."""
        return dict(sorted(self.named_parameters(recurse=False)))


class Replacement(Layer):
    """Trained copies of a module's own parameters (`modules_to_save`, biases): the module runs with them instead.

    Copies are at least float32 and are cast to the module's dtype when it runs.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base.with_parameters(self.slots(), *args, **kwargs)

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: slot.detach() for name, slot in self.slots().items()}


def wide(tensor: Tensor) -> Tensor:
    """At least float32: what is trained and what deltas are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def bias_shift(trained: Tensor, base: Base) -> Tensor:
    """What a trained bias adds to the output of a module that has already added its own."""
    frozen = base.affine()[1]
    assert frozen is not None, "a bias is trained only where there is one"
    return trained - frozen


def _compiles(pattern: str) -> str:
    try:
        re.compile(rf"(.*\.)?({pattern})$")  # as rank patterns use it, where global flags may not stand
    except re.error as error:
        raise ValueError(f"not a valid regular expression: {error}") from None
    return pattern


Regex = Annotated[StrictStr, AfterValidator(_compiles)]


def exactly(paths: Iterable[str]) -> tuple[str, ...] | str:
    """`target_modules` that name these paths and no others: a list, unless a path could be the end of another one."""
    paths = sorted(paths)
    return tuple(paths) if all("." in path for path in paths) else "|".join(map(re.escape, paths))


class TargetedMethod(adapter.Method):
    """The fields every method shares that stands beside chosen modules.

    A pattern list matches a module whose path equals an entry or ends with `"." + entry`; a string is a regular
    expression that must match the whole path. Every pattern must match something.
    """

    target_modules: Names | Regex = "all-linear"
    """List of path suffixes, one regular expression, or "all-linear": every linear module but the head."""
    exclude_modules: Names | Regex = ()
    """Modules to leave out, in the same two forms."""
    layers_to_transform: Indices | StrictInt | None = None
    """Indices of the layers to adapt (the first number in a path); None adapts all."""
    modules_to_save: Names = ()
    """Modules (norms, embeddings, a head) to train whole beside the method, by suffix."""

    @abstractmethod
    def layer(self, shape: Shape, generator: torch.Generator) -> Layer:
        """A new layer for one matched module; its output equals the base's until it is trained."""

    @abstractmethod
    def restored(self, shape: Shape, slots: Mapping[str, Tensor]) -> Layer:
        """The layer that holds stored tensors; raises `AdapterFileError` when they do not fit the module."""

    @abstractmethod
    def bias_modules(self, targets: list[str], biased: list[str]) -> list[str]:
        """Which modules, of those that own a bias and are not targets, get a trained bias of their own."""
