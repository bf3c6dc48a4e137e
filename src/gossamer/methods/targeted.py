"""What every method that stands beside chosen modules shares: how modules are named, and how layers come about."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from gossamer.adapter import Method, Tensors
from gossamer.errors import UnsupportedError
from gossamer.methods.base import Base, Layer, Shape
from gossamer.methods.peft import PeftLayout
from gossamer.spec import Indices, Names, StrictInt, StrictStr

_NEEDS_THE_BASE = "gossamer.combine adds the changes that it makes to a base's weights, where base= gives them"


def _compiles(pattern: str) -> str:
    try:
        re.compile(rf"(.*\.)?({pattern})$")  # as rank patterns use it, where global flags may not stand
    except re.error as error:
        raise ValueError(f"not a valid regular expression: {error}") from None
    return pattern


Regex = Annotated[StrictStr, AfterValidator(_compiles)]


class TargetedMethod(Method):
    """A method that stands beside chosen modules; a layer is `build(shape, initial(base))`, or built of stored slots.

    A pattern list matches a module whose path equals an entry or ends with `"." + entry`; a string is a regular
    expression that must match the whole path. Every pattern must match something.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    """The roles (see `gossamer.methods.roles`) that "auto" means; none: every module that fits."""
    beside_calls: ClassVar[bool] = True
    """Whether its layers stand beside a module's calls, which must then be the map that the module's kind says and the
    only use of its weight. If not, they are other values of its parameters, which hold wherever those are used."""
    stands_at: ClassVar[str] = "linear modules"
    """In words, for the error of a model that has none of them."""
    lr_over_lora: ClassVar[float]
    """What `lr: auto` gives this method, over what it gives LoRA; every registered method states its own."""
    peft: ClassVar[PeftLayout | None] = None
    """How PEFT stores it; None for what PEFT has not. A subclass that PEFT would read as this method says it anew."""
    dotted_slots: ClassVar[tuple[str, ...]] = ()
    """Slots with a dot in their names, which a file's names do not tell from a path."""
    outer_slots: ClassVar[tuple[str, ...]] = ()
    """Slots that LoRA+ gives a learning rate of their own: the factor that is applied last."""

    target_modules: Names | Regex = "auto"
    """List of path suffixes, one regular expression, "all-linear" (every linear module but the head), or "auto"."""
    exclude_modules: Names | Regex = ()
    """Modules to leave out, with all inside them: a list of suffixes or one regular expression."""
    layers_to_transform: Indices | StrictInt | None = None
    """Indices of the layers to adapt (the first number in a path); None adapts all."""
    modules_to_save: Names = ()
    """Modules (norms, embeddings, a head) to train whole beside the method, by suffix."""
    trainable_tokens: dict[StrictStr, Indices] | Indices = ()
    """Rows of the input embedding (or of the embeddings named) to train whole: token ids, new ones for example."""

    @abstractmethod
    def fits(self, shape: Shape) -> bool:
        """Whether this method can stand at such a module."""

    @abstractmethod
    def expected(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Slot name -> shape of the layer at such a module, sorted by name."""

    @abstractmethod
    def initial(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        """Slot values of a new layer: with them the output equals the base's (prompts and prefixes excepted)."""

    @abstractmethod
    def build(self, shape: Shape, slots: Mapping[str, Tensor], common: nn.Module | None) -> Layer:
        """The layer that holds these slots, which have the expected names and shapes."""

    def common(self, shapes: Sequence[Shape], stored: Mapping[str, Tensor]) -> nn.Module | None:
        """What all layers of one adapter share, drawn anew or from stored tensors."""
        return None

    def check(self, shapes: Sequence[Shape]) -> None:
        """Raise an error for a setting that names none of the modules where layers will stand."""
        return

    def bias_modules(self, targets: list[str], biased: list[str]) -> list[str]:
        """Which modules, of those that own a bias and are not targets, get a trained bias of their own."""
        return []

    def delta(self, path: str, slots: Mapping[str, Tensor]) -> Tensor:
        raise UnsupportedError(
            f"the change that {self.name} makes is not told by its tensors at one module alone", where=path
        )

    def scaled(self, tensors: Tensors, weight: float) -> tuple[Method, Tensors]:
        raise UnsupportedError(f"adapters of {self.name} cannot be scaled", hint=_NEEDS_THE_BASE)

    def summed(self, tensors: Tensors, other: Method, other_tensors: Tensors) -> tuple[Method, Tensors]:
        raise UnsupportedError(f"adapters of {self.name} cannot be added", hint=_NEEDS_THE_BASE)

    def resized(
        self, tensors: Tensors, r: int | None, energy: float | None, pooled: bool
    ) -> tuple[Method, Tensors, dict[str, float], float]:
        raise UnsupportedError(f"adapters of {self.name} cannot be resized", hint=_NEEDS_THE_BASE)


def exactly(paths: Iterable[str]) -> tuple[str, ...] | str:
    """`target_modules` that name these paths and no others: a list, unless a path could be the end of another one."""
    paths = sorted(paths)
    return tuple(paths) if all("." in path for path in paths) else "|".join(map(re.escape, paths))


def matches_end(pattern: str, path: str) -> bool:
    """Whether a rank or alpha pattern names `path`: it must cover the path, or its end after a dot (PEFT's rule)."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
