"""Layers that are other values of a module's own parameters: the module runs with them instead."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.kernels.routing import LinearChange
from gossamer.methods.base import LINEAR_KINDS, Base, Layer
from gossamer.methods.slots import hold


class ParameterLayer(Layer):
    """A layer that is another value of the module's own parameters: the module runs with that value instead."""

    innermost = True

    @abstractmethod
    def presented(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters, given those of the module or of the layers further in."""

    def run_presented(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the values that are presented."""
        return base.with_parameters(self.presented(base.parameters()), *args, **kwargs)


class Replacement(ParameterLayer):
    """Trained copies of a module's own parameters (`modules_to_save`, biases, norms, a whole model).

    Copies are at least float32 and are cast to the module's dtype when it runs. A parameter that the model stores once
    for two modules is trained once: the second module's layer borrows it from the first's.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        hold(self, values)
        self.borrowed: dict[str, tuple[Replacement, str]] = {}

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return self.run_presented(base, *args, **kwargs)

    def neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        """The module's own values: decay is of the change, as it is of a product of factors."""
        return {name: base.value(name).detach() for name, _ in self.named_parameters()}

    def replaces(self) -> list[str]:
        return [*dict(self.named_parameters()), *self.borrowed]

    def linear_change(self, base: Base) -> LinearChange | None:
        if base.shape.kind not in LINEAR_KINDS:
            return None
        values = self.presented(base.parameters())
        weight, bias = values["weight"].detach(), values.get("bias")
        if "weight" not in self.replaces():
            return LinearChange() if bias is None else LinearChange(shift=bias_shift(bias.detach(), base))
        return LinearChange(
            weight=weight if base.shape.kind == "linear" else weight.T, bias=bias if bias is None else bias.detach()
        )

    def presented(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parameters) | self._values()

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self._values().items()}

    def _values(self) -> dict[str, Tensor]:
        borrowed = {name: layer.get_parameter(there) for name, (layer, there) in self.borrowed.items()}
        return {**dict(self.named_parameters()), **borrowed}


def bias_shift(trained: Tensor, base: Base) -> Tensor:
    """What a trained bias adds to the output of a module that has already added its own."""
    frozen = base.bias()
    assert frozen is not None, "a bias is trained only where there is one"
    return trained - frozen
