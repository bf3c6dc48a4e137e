"""A module as an adapter layer may see it: what it is, how it is called, how its weight is read and stood in for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.methods import Shape
from gossamer.methods.base import AFFINE_KINDS
from gossamer.quant import QuantizedLinear

_CONVOLVE = {
    nn.Conv1d: nn.functional.conv1d,
    nn.Conv2d: nn.functional.conv2d,
    nn.Conv3d: nn.functional.conv3d,
}


def kind_of(module: nn.Module) -> str:
    """What a module is to an adapter; see `Shape.kind`."""
    if isinstance(module, QuantizedLinear):
        return "linear"
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return _kind_without_weight(module)
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, tuple(_CONVOLVE)):
        return "conv"
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else ""


def _kind_without_weight(module: nn.Module) -> str:
    """A weight may be computed by a parametrisation or not made yet; then there is nothing to adapt."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    own = module._parameters
    if own and "expert" in type(module).__name__.lower() and any(p is not None and p.ndim == 3 for p in own.values()):
        return "experts"
    if _is_decoder(module) and "past_key_values" in inspect.signature(type(module).forward).parameters:
        return "model"
    return ""


def _is_decoder(module: nn.Module) -> bool:
    """A transformers model that may read left to right; whether it does, its signature tells."""
    config = getattr(module, "config", None) if hasattr(type(module), "base_model_prefix") else None
    return config is not None and not getattr(config, "is_encoder_decoder", False)


def shape_of(path: str, module: nn.Module, matrices: tuple[str, ...] | None = None) -> Shape:
    """What a method may know of a module.

    Args:
        matrices: of experts or attention, the names of the matrices to adapt; None for all.
    """
    kind = kind_of(module)
    own = parameters_of(module)
    outer = inner = 0
    kernel: tuple[int, ...] = ()
    if kind in AFFINE_KINDS:
        outer, inner, *rest = own["weight"].shape
        kernel = tuple(rest)
        if kind in ("conv1d", "embedding"):
            outer, inner = inner, outer
    groups = int(getattr(module, "groups", 1)) if kind == "conv" else 1
    transposed = kind == "experts" and bool(getattr(module, "is_transposed", False))
    return Shape(
        path,
        kind,
        type(module).__name__,
        outer,
        inner * groups,
        own,
        kernel,
        groups,
        {name: size for name, size in _matrices(kind, own, transposed).items() if matrices is None or name in matrices},
        transposed,
        config=getattr(module, "config", None) if kind == "model" else None,
        embeddings=module.get_input_embeddings().weight if kind == "model" else None,  # pyright: ignore[reportCallIssue]
    )


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


def _matrices(kind: str, own: Mapping[str, Tensor], transposed: bool) -> dict[str, tuple[int, int, int]]:
    if kind == "attention":
        return {name: (1, value.shape[0], value.shape[1]) for name, value in own.items() if value.ndim == 2}
    if kind == "experts":
        return {
            name: (value.shape[0], value.shape[2 if transposed else 1], value.shape[1 if transposed else 2])
            for name, value in own.items()
            if value.ndim == 3
        }
    return {}


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
        convolve = next(function for kind, function in _CONVOLVE.items() if isinstance(module, kind))
        return convolve(x, weight, None, module.stride, padding, module.dilation)

    def _embedded(self, x: Tensor, rows: Tensor) -> Tensor:
        """Other rows looked up as the module looks up its own: a subclass may shift indices or scale what it finds."""
        module: Any = self.module
        if type(module) is nn.Embedding:
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
    """A layer around a call, itself the base of the next layer.

    Innermost layers are other values of the module's parameters: they stand closest to it, each sees what those
    further in present, and the outermost of them runs the module with the sum of it all.
    """

    __slots__ = ("base", "layer", "shape")

    def __init__(self, layer: Any, base: Any) -> None:
        self.layer, self.base, self.shape = layer, base, base.shape

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.base, *args, **kwargs)

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """The frozen module's own weight and bias, whatever stands between."""
        return self.base.affine()

    def bias(self) -> Tensor | None:
        """The frozen module's own bias."""
        return self.base.bias()

    def value(self, name: str) -> Tensor:
        """One of the frozen module's own parameters."""
        return self.base.value(name)

    def is_plain(self) -> bool:
        """No: a layer stands in between."""
        return False

    def version(self) -> tuple[int, int]:
        """Of the frozen module's weight."""
        return self.base.version()

    def mapped(self, x: Tensor, weight: Tensor) -> Tensor:
        """The frozen module's own map."""
        return self.base.mapped(x, weight)

    def checkpointed(self) -> bool:
        """The frozen module's own answer."""
        return self.base.checkpointed()

    def parameters(self) -> dict[str, Tensor]:
        """As the layers so far present them."""
        return self.layer.presented(self.base.parameters())

    def with_parameters(self, replaced: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Straight to the module: `replaced` already holds what the layers between present."""
        return self.base.with_parameters(replaced, *args, **kwargs)
