"""The tensors of a layer by name: put in their places, and compared with what a module asks for."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gossamer.errors import AdapterFileError


def hold(layer: nn.Module, slots: Mapping[str, Tensor]) -> None:
    """Give a layer its slots as parameters, under the very names; a dotted one lies in a child."""
    for name, value in slots.items():
        place, (*path, last) = layer, name.split(".")
        for part in path:
            place.add_module(part, place._modules.get(part) or nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)))


def check_slots(path: str, slots: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `AdapterFileError` unless the tensors have exactly these names and shapes."""
    got = {name: tuple(tensor.shape) for name, tensor in slots.items()}
    if got != dict(expected):
        raise AdapterFileError("tensors that do not fit the module", where=path, got=str(got), expected=str(expected))
