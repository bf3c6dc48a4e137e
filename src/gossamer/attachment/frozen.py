"""A module as an adapter layer may see it: what it is, how it is called, how its weight is read and stood in for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.methods import Shape
from gossamer.quant import QuantizedLinear

CONVOLVE = {
    nn.Conv1d: nn.functional.conv1d,
    nn.Conv2d: nn.functional.conv2d,
    nn.Conv3d: nn.functional.conv3d,
}
"""The convolutions that can be adapted, and their functions."""


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's direct parameters; of torch's attention also those of `out_proj`, which it uses without calling it.

    A weight that is stored in few bits is there in outline alone: to rebuild it takes time and memory.
    """
    own = {name: value for name, value in module._parameters.items() if value is not None}
    if isinstance(module, nn.MultiheadAttention):
        own |= {f"out_proj.{name}": value for name, value in module.out_proj._parameters.items() if value is not None}
    if isinstance(module, QuantizedLinear):
        own = {"weight": module.outline} | own
    return own  # pyright: ignore[reportReturnType]


def owner(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a parameter of `parameters_of` is kept, and its name there."""
    part, _, last = name.rpartition(".")
    return module.get_submodule(part)._parameters, last


class Frozen:
    """The frozen half of a site: the module itself, whatever stands at it."""

    def __init__(self, shape: Shape, module: nn.Module) -> None:
        self.shape, self.module = shape, module
        self.outer: Callable[..., Any] | None = module.__dict__.get("forward")  # another tool's override

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the frozen module."""
        if self.outer is not None:
            return self.outer(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Weight as (out, in, *kernel), and bias or None."""
        weight = self.value("weight")
        turned = self.shape.kind in ("conv1d", "embedding")
        return (weight.T if turned else weight), self.bias()

    def bias(self) -> Tensor | None:
        """The bias alone."""
        return self.module._parameters.get("bias")

    def value(self, name: str) -> Tensor:
        """One of `parameters_of` in numbers."""
        place, last = owner(self.module, name)
        stored = place[last]
        return stored if stored is not None else getattr(self.module, name)

    def is_plain(self) -> bool:
        """Whether calling it is exactly `x W^T + b` with its own frozen weight."""
        module = self.module
        plain = type(module) in (nn.Linear, QuantizedLinear) or self.shape.kind == "conv1d"
        if self.outer is not None or not plain:
            return False
        frozen = not any(own is not None and own.requires_grad for own in module._parameters.values())
        return frozen and not torch.is_autocast_enabled(self.shape.device.type)

    def version(self) -> tuple[int, int]:
        """Where the stored weight is, and how often it was written to."""
        stored: Any = self.module._parameters["weight"]
        stored = self.module.codes if stored is None else stored
        return stored.data_ptr(), stored._version

    def mapped(self, x: Tensor, weight: Tensor) -> Tensor:
        """The module's own linear map with another weight (rows, in, *kernel) and no bias."""
        module: Any = self.module
        if self.shape.kind == "embedding":
            return self._embedded(x, weight.T)
        if self.shape.kind != "conv":
            return nn.functional.linear(x, weight)
        padding = module.padding
        if module.padding_mode != "zeros":
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        convolve = next(function for kind, function in CONVOLVE.items() if isinstance(module, kind))
        return convolve(x, weight, None, module.stride, padding, module.dilation)

    def _embedded(self, x: Tensor, rows: Tensor) -> Tensor:
        """Other rows looked up as the module looks up its own: a subclass may shift indices or scale what it finds."""
        module: Any = self.module
        if type(module) is nn.Embedding and self.outer is None:
            return nn.functional.embedding(x, rows)
        kept = module.padding_idx, module.max_norm  # these are about its own rows
        module.padding_idx = module.max_norm = None
        try:
            return self.with_parameters({"weight": rows}, x)
        finally:
            module.padding_idx, module.max_norm = kept

    def checkpointed(self) -> bool:
        """Whether it is being trained with gradient checkpointing."""
        return self.module.training and any(
            getattr(part, "gradient_checkpointing", False) for part in self.module.modules()
        )

    def parameters(self) -> dict[str, Tensor]:
        """The direct parameters, as stored."""
        return parameters_of(self.module)

    @contextmanager
    def replacing(self, replaced: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, the module runs with some of its direct parameters replaced."""
        current = self.parameters()
        places = {name: owner(self.module, name) for name in replaced if replaced[name] is not current[name]}
        kept = {name: place[last] for name, (place, last) in places.items()}
        for name, (place, last) in places.items():
            place[last] = replaced[name].to(current[name].dtype)
        try:
            yield
        finally:
            for name, (place, last) in places.items():
                place[last] = kept[name]

    def with_parameters(self, replaced: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the frozen module with some of its direct parameters replaced for this call."""
        with self.replacing(replaced):
            return self(*args, **kwargs)


class Stacked:
    """A layer around a call, itself the base of the next layer; most of its answers are the frozen module's.

    Innermost layers are other values of the module's parameters: they stand closest to it, each sees what those
    further in present, and the outermost of them runs the module with the sum of it all.
    """

    __slots__ = ("base", "layer", "shape")

    def __init__(self, layer: Any, base: Any) -> None:
        self.layer, self.base, self.shape = layer, base, base.shape

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.base, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # weight, bias, map and the rest: the frozen module's own
        return getattr(self.base, name)

    def is_plain(self) -> bool:
        """No: a layer stands in between."""
        return False

    def parameters(self) -> dict[str, Tensor]:
        """As the layers so far present them."""
        return self.layer.presented(self.base.parameters())
