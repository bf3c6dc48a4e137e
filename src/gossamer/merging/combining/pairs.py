"""The changes that an adapter makes, matrix by matrix: from its factors, or from what its layers make of a base."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.errors import StateError, UnsupportedError, nearest
from gossamer.linalg import LowRankPair
from gossamer.methods import LoRA, TargetedMethod
from gossamer.methods.base import Shape, wide
from gossamer.methods.pairs import StoredPair, pairs_of

BaseWeights = Mapping[str, Tensor] | nn.Module


class AdapterPairs:
    """The pairs of one adapter: all known at once where it holds factors, made one at a time where a base is needed.

    Args:
        adapter: of any method whose layers merge. base: see `combine`.

    Raises `UnsupportedError` for parameters trained whole, for methods that are no change of weights, and, without a
    base, for those whose change depends on it.
    """

    def __init__(self, adapter: Adapter, base: BaseWeights | None) -> None:
        self.adapter, self.base = adapter, base
        self.known = pairs_of(adapter.spec, adapter.tensors) if isinstance(adapter.spec, LoRA) else None
        if self.known is None and base is None:
            raise UnsupportedError(
                f"what {adapter.spec.name} changes depends on the weights it stands at",
                hint="give the base: combine(..., base=model), or its weights by module path",
            )
        self.places = tuple(self.known) if self.known is not None else tuple(path for path in adapter.paths if path)
        spec = adapter.spec
        if self.known is None and isinstance(spec, TargetedMethod):
            shapes = [self._shape(path) for path in self.places]
            self.common = spec.common(shapes, adapter.tensors[""]) if "" in adapter.tensors else None

    @property
    def full(self) -> bool:
        """Whether its changes have as many directions as the matrices do."""
        return self.known is None

    def at(self, place: str) -> StoredPair:
        """The change of one matrix, its scaling in it."""
        if self.known is not None:
            return self.known[place]
        change = self._made(place)
        identity = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
        inner, outer = (identity, change) if change.shape[1] < change.shape[0] else (change, identity)
        return StoredPair(LowRankPair(inner[None], outer[None]))

    def _made(self, path: str) -> Tensor:
        """What a layer makes of the base's weight, less that weight: (out, in)."""
        spec, slots, shape = self.adapter.spec, self.adapter.tensors[path], self._shape(path)
        assert isinstance(spec, TargetedMethod)
        if not spec.fits(shape) or {name: tuple(slot.shape) for name, slot in slots.items()} != spec.expected(shape):
            raise UnsupportedError(
                "no change of one linear module's weight alone", where=path, got=f"{spec.name}: {', '.join(slots)}"
            )
        current = {name: wide(value.detach()) for name, value in shape.parameters.items()}
        folded = spec.build(shape, slots, self.common).merged(current, current)
        bias = current.get("bias")
        if bias is not None and "bias" in folded and not torch.equal(folded["bias"], bias):
            raise UnsupportedError("it changes the bias too, which factors cannot hold", where=path, got=spec.name)
        return folded["weight"] - current["weight"]

    def _shape(self, path: str) -> Shape:
        parameters = _parameters(self.base, path)
        outer, inner = parameters["weight"].shape
        return Shape(path, "linear", "Linear", outer, inner, parameters)


def _parameters(base: BaseWeights | None, path: str) -> dict[str, Tensor]:
    """Weight (out, in) of the linear module at `path`, and its bias where the base tells it."""
    if isinstance(base, nn.Module):
        names = [name for name, _ in base.named_modules()]
        if path not in names:
            raise StateError("the base has no such module", where=path, hint=nearest(path, names))
        module = base.get_submodule(path)
        found: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        if type(module).__name__ == "Conv1D" and "weight" in found:  # transformers' transposed linear
            found["weight"] = found["weight"].T
    else:
        stored = base or {}
        found = {name: stored[f"{path}.{name}"] for name in ("weight", "bias") if f"{path}.{name}" in stored}
    if "weight" not in found or found["weight"].ndim != 2 or not found["weight"].is_floating_point():
        raise StateError("the base has no plain matrix here", where=f"{path}.weight", got=", ".join(found) or "nothing")
    return found
