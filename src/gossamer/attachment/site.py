"""One module that carries adapter layers: how it is called, how its weight is read and written.

The module stays in the model's tree under its own name and class. While adapters stand at it, its `forward` is this
site's, and its layers are children under the name `gossamer`, so `.to()`, `.train()` and `.parameters()` reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.attachment.walk import CONTAINER
from gossamer.errors import StateError
from gossamer.methods import Layer, Replacement, Shape

if TYPE_CHECKING:
    from gossamer.attachment.host import Host

Active = tuple[str, ...]
"""Names whose layers run, in order."""


def kind_of(module: nn.Module) -> str:
    """What can be adapted: "linear", "conv1d" (GPT-2's, its weight stored as (in, out)), or "" for neither."""
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return ""  # computed by a parametrisation, or not made yet
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else ""


def shape_of(path: str, module: nn.Module) -> Shape:
    """What a method may know of a module."""
    kind = kind_of(module)
    weight = module._parameters.get("weight")
    rows, columns = tuple(weight.shape) if kind and weight is not None else (0, 0)
    out_features, in_features = (columns, rows) if kind == "conv1d" else (rows, columns)
    return Shape(path, kind, in_features, out_features, dict(module.named_parameters(recurse=False)))


class Site:
    """A module, the layers that stand at it, and the frozen call they stand beside."""

    def __init__(self, path: str, module: nn.Module, host: Host) -> None:
        self.path, self.module, self.host = path, module, host
        self.shape = shape_of(path, module)
        self.outer = module.__dict__.get("forward")  # another tool's override, put back when we leave
        self.layers = nn.ModuleDict()
        module.add_module(CONTAINER, self.layers)
        self.enable()

    def add(self, name: str, layer: Layer) -> None:
        """Stand a layer here."""
        self.layers._modules[name] = layer  # ModuleDict itself would refuse names such as "half" or "train"

    def enable(self) -> None:
        """Let calls of the module pass through this site."""
        self.module.forward = self.run

    def disable(self) -> None:
        """Let calls of the module reach it as if nothing stood there: not even a Python frame is added."""
        if self.outer is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self.outer

    def remove(self) -> None:
        """Leave the module as it was found."""
        self.disable()
        del self.module._modules[CONTAINER]

    # What a layer sees of its base ------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the frozen module."""
        if self.outer is not None:
            return self.outer(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Weight as (out, in), and bias or None."""
        weight: Any = self.module._parameters.get("weight")
        return (weight.T if self.shape.kind == "conv1d" else weight), self.module._parameters.get("bias")

    @contextmanager
    def replacing(self, replaced: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, the module runs with some of its direct parameters replaced."""
        own: dict[str, Any] = self.module._parameters
        kept = {name: own[name] for name in replaced}
        own.update({name: value.to(kept[name].dtype) for name, value in replaced.items()})
        try:
            yield
        finally:
            own.update(kept)

    def with_parameters(self, replaced: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the frozen module with some of its direct parameters replaced for this call."""
        with self.replacing(replaced):
            return self(*args, **kwargs)

    # The adapted call ------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward while adapters are attached: the active layers around the frozen call."""
        active = self.host.active
        if not args and len(kwargs) == 1:  # `linear(input=x)`
            args, kwargs = (*kwargs.values(),), {}
        if isinstance(active, list):
            return self._run_rows(active, args, kwargs)
        return self._stacked(active)(*args, **kwargs)

    def _stacked(self, active: Active) -> Callable[..., Any]:
        call: Any = self
        for layer in self.standing(active):
            call = Stacked(layer, call)
        return call

    def standing(self, active: Active) -> list[Layer]:
        """The layers of the named adapters here, innermost first; one that replaces parameters is always innermost."""
        layers: list[Any] = [self.layers[name] for name in active if name in self.layers]
        return sorted(layers, key=lambda layer: not isinstance(layer, Replacement)) if len(layers) > 1 else layers

    def _run_rows(self, rows: Sequence[Active], args: tuple, kwargs: dict) -> Any:
        """One adapter (or none) for every row of the batch: the plain way, one call for each distinct entry."""
        if not args:
            raise StateError("one adapter a row needs the batch as the module's first argument", where=self.path)
        x, *rest = args
        if x.shape[0] != len(rows):
            raise StateError(
                "one adapter a row needs one entry for each row of the batch",
                where=self.path,
                got=f"{len(rows)} entries, input of shape {tuple(x.shape)}",
            )
        out = None
        for entry in dict.fromkeys(rows):
            index = torch.tensor([row for row, name in enumerate(rows) if name == entry], device=x.device)
            part = self._stacked(entry)(x[index], *rest, **kwargs)
            out = part.new_empty(x.shape[0], *part.shape[1:]) if out is None else out
            out = out.index_copy(0, index, part)
        return out

    # Merging ---------------------------------------------------------------------------------------------------

    def merged(self, names: Active) -> dict[str, Tensor]:
        """Those of the module's own parameters that change when the named layers are folded in, ready to be stored."""
        stored = {name: value.detach() for name, value in self.module.named_parameters(recurse=False)}
        changed: dict[str, Tensor] = {}
        for layer in self.standing(names):
            if isinstance(layer, Replacement):
                changed |= layer.merged(stored | changed, stored)
            else:
                changed |= self._oriented(layer.merged(self._oriented(stored | changed), self._oriented(stored)))
        return {name: value.to(stored[name].dtype) for name, value in changed.items()}

    def _oriented(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A Conv1D stores its weight as (in, out); this turns it round, there and back."""
        turned = dict(parameters)
        if self.shape.kind == "conv1d" and "weight" in turned:
            turned["weight"] = turned["weight"].T
        return turned


class Stacked:
    """A layer around a call, itself the base of the next layer.

    A replacement is always innermost, so its base is the site; everything above sees the frozen weight and bias.
    """

    __slots__ = ("base", "layer")

    def __init__(self, layer: Layer, base: Any) -> None:
        self.layer, self.base = layer, base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.base, *args, **kwargs)

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """The frozen module's own weight and bias, whatever stands between."""
        return self.base.affine()

    def with_parameters(self, replaced: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Never reached through another layer; see above."""
        return self.base.with_parameters(replaced, *args, **kwargs)
