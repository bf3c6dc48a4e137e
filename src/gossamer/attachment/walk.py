"""What a model is made of, seen through anything Gossamer put there: canonical names, aliases, shared storage."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gossamer.errors import StateError
from gossamer.quant import QuantizedLinear, sampled

CONTAINER = "gossamer"
"""The child under which a module carries its adapter layers; no walk enters it."""
FINGERPRINT = "base_fingerprint"
"""Where the config of a model that is stored quantised notes what it was made of."""
UNKNOWN = "unknown"
NOTED = "_gossamer_fingerprint"
"""Where a model notes its fingerprint, if its weights lie in files that nobody changes: to look again is slow."""


def _visits(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under every name it has, in the model's order; adapter layers are not entered.

    torch's own `named_modules` would enter them, and make the fiftieth adapter slower to attach than the first.
    """
    found: list[tuple[str, nn.Module]] = []

    def visit(module: nn.Module, path: str) -> None:
        found.append((path, module))
        for name, child in module._modules.items():
            if child is not None and name != CONTAINER:
                visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Canonical path -> module, each module once, under the first name it has."""
    first: dict[nn.Module, str] = {}
    for path, module in _visits(model):
        first.setdefault(module, path)
    return {path: module for module, path in first.items()}


def modules_and_names(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """The same, and canonical path -> every path the module has; more than one for a shared module."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in _visits(model):
        found.setdefault(module, []).append(path)
    return {paths[0]: module for module, paths in found.items()}, {paths[0]: paths for paths in found.values()}


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters by canonical name, each once; adapter parameters are not among them."""
    seen: set[int] = set()
    for path, module in modules(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), parameter


def owners_of_storage(model: nn.Module) -> dict[int, list[str]]:
    """Storage address -> the parameters that live in it; more than one means that a change of one changes all."""
    found: dict[int, list[str]] = {}
    for path, module in modules(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() and parameter.device.type != "meta":
                found.setdefault(parameter.untyped_storage().data_ptr(), []).append(f"{path}.{name}" if path else name)
    return found


def base_size(model: nn.Module) -> int:
    """How many numbers the model's own parameters are, whatever they are stored as."""
    dense = sum(parameter.numel() for _, parameter in base_parameters(model))
    return dense + sum(module.in_features * module.out_features for _, module in _packed(model))


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """What tells one base model from another, cheap and the same for float32, bfloat16 and quantised copies.

    Returns:
        {"architecture": class name, "shapes": sha256 of all names and shapes, "weights": sha256 of 32 values of each
        parameter, rounded to bfloat16}. Of a quantised weight they are those of the weight it was made of; where nobody
        noted those down, "weights" and "shapes" are what the config says, or "unknown". Cost: a few milliseconds for
        hundreds of parameters.
    """
    noted = vars(model).get(NOTED)
    if noted is not None:
        return dict(noted)
    stored = {name: identity(parameter) for name, parameter in base_parameters(model)}
    for path, module in _packed(model):
        if module.sampled is None:
            noted = getattr(getattr(model, "config", None), FINGERPRINT, None) or {}
            return {"architecture": type(model).__name__} | {
                part: str(noted.get(part, UNKNOWN)) for part in ("shapes", "weights")
            }
        stored[f"{path}.weight" if path else "weight"] = module.sampled
    return fingerprint(model, stored)


def fingerprint(model: nn.Module, stored: Mapping[str, tuple[tuple[int, ...], bytes]]) -> dict[str, str]:
    """The same of parameters whose `identity` is known."""
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, (shape, words) in sorted(stored.items()):
        weights.update(name.encode() + words)
        shapes.update(f"{name}:{shape};".encode())
    return {"architecture": type(model).__name__, "shapes": shapes.hexdigest(), "weights": weights.hexdigest()}


def _packed(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Path and module of every weight that is held by codes."""
    for path, module in modules(model).items():
        if isinstance(module, QuantizedLinear) and module.runs_packed:
            yield path, module


def identity(parameter: Tensor) -> tuple[tuple[int, ...], bytes]:
    """What a parameter gives to the fingerprint: its shape, and 32 of its values."""
    if parameter.is_meta or nn.parameter.is_lazy(parameter):
        raise StateError("the model's weights are not there yet", got="meta or lazy parameters", hint="load them first")
    return tuple(parameter.shape), sampled(parameter)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Which parts of two fingerprints differ; what is unknown differs from nothing."""
    return [
        part
        for part in ("architecture", "shapes", "weights")
        if one.get(part) != other.get(part) and UNKNOWN not in (one.get(part), other.get(part))
    ]
