"""The Adapter value: a spec, named tensors, and where they came from.

An adapter is not a wrapper around a model. It is a value that can be added, scaled, compared, saved and attached:

    delta(path) = scaling(path) * B A        (out, in), the change of one weight matrix
    (a + b).delta(path) = a.delta(path) + b.delta(path)      exact: factors are concatenated, ranks add
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from gossamer.errors import StateError, UsageError, nearest
from gossamer.spec import Spec

Tensors = Mapping[str, Mapping[str, Tensor]]

_ABOUT_THE_BASE = ("base_model_name_or_path", "fan_in_fan_out")


class Method(Spec):
    """What an adapter's spec knows about its own tensors; one class a method, registered in `gossamer.methods`."""

    name: ClassVar[str]

    @abstractmethod
    def delta(self, path: str, slots: Mapping[str, Tensor]) -> Tensor:
        """The change of the weight at `path`, (out, in); at least float32."""

    @abstractmethod
    def scaled(self, tensors: Tensors, weight: float) -> tuple[Method, Tensors]:
        """Spec and tensors of `weight` times the adapter."""

    @abstractmethod
    def summed(self, tensors: Tensors, other: Method, other_tensors: Tensors) -> tuple[Method, Tensors]:
        """Spec and tensors of the sum of two adapters; exact, or a typed refusal."""

    def to_dict(self) -> dict[str, Any]:
        """The fields together with the method's registered name."""
        return {"name": self.name} | super().to_dict()


@dataclass(frozen=True, eq=False)
class Adapter:
    """A learned change of some of a base model's weights, as a value.

    Attributes:
        spec: the method and its hyper-parameters.
        tensors: canonical module path -> slot -> tensor, e.g. `["model.layers.0.mlp.up_proj"]["lora_A"]` of shape
            (r, in). Whole parameters that were trained (`modules_to_save`, biases) stand under their own names.
        base: fingerprint of the base model it was made for, or None when the file did not say.
        provenance: where it came from; free JSON.
        foreign: the PEFT config it was read from, kept whole so that writing it back loses nothing.
    """

    spec: Method
    tensors: Tensors
    base: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    foreign: Mapping[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> Any:  # read-only mappings do not travel between processes
        plain = {path: dict(slots) for path, slots in self.tensors.items()}
        return type(self), (self.spec, plain, self.base and dict(self.base), dict(self.provenance), dict(self.foreign))

    def __post_init__(self) -> None:
        ordered = {path: MappingProxyType(dict(sorted(self.tensors[path].items()))) for path in sorted(self.tensors)}
        object.__setattr__(self, "tensors", MappingProxyType(ordered))

    @property
    def paths(self) -> tuple[str, ...]:
        """The canonical module paths it changes, sorted."""
        return tuple(self.tensors)

    def named_tensors(self) -> dict[str, Tensor]:
        """Flat view: `"<path>.<slot>"` -> tensor, sorted."""
        return {f"{path}.{slot}": tensor for path, slots in self.tensors.items() for slot, tensor in slots.items()}

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.named_tensors().values())

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in memory; a file adds a header of a few kilobytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.named_tensors().values())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over spec and tensors: equal digests mean bit-equal behaviour on the same base."""
        total = hashlib.sha256(json.dumps(self.spec.to_dict(), sort_keys=True).encode())
        for name, tensor in self.named_tensors().items():
            total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            total.update(tensor_bytes(tensor))
        return total.hexdigest()

    def delta(self, path: str) -> Tensor:
        """The change of the weight at `path`: `scaling * B @ A`, (out, in), at least float32. Raises `StateError`."""
        if path not in self.tensors:
            raise StateError(f"this adapter does not change {path!r}", hint=nearest(path, self.paths))
        return self.spec.delta(path, self.tensors[path])

    def __add__(self, other: Adapter) -> Adapter:
        """The exact sum: `(a + b).delta(p) = a.delta(p) + b.delta(p)`. Raises `UnsupportedError` where none exists."""
        if not isinstance(other, Adapter):
            return NotImplemented
        if self.base and other.base and self.base != other.base:
            raise StateError("adapters of different bases have no sum", got=str(other.base), expected=str(self.base))
        spec, tensors = self.spec.summed(self.tensors, other.spec, other.tensors)
        origin = {"operation": "sum", "of": [self.digest, other.digest]}
        kept = {key: value for key, value in self.foreign.items() if key in _ABOUT_THE_BASE}
        return Adapter(spec, tensors, self.base or other.base, origin, kept)

    def __mul__(self, weight: float) -> Adapter:
        """`weight` times the adapter; `1 * a` is `a`. Raises `UnsupportedError` where none exists."""
        if not isinstance(weight, int | float):
            return NotImplemented
        if not math.isfinite(weight):
            raise UsageError("an adapter's weight is a finite number", got=str(weight))
        if weight == 1:
            return self
        spec, tensors = self.spec.scaled(self.tensors, float(weight))
        return replace(
            self, spec=spec, tensors=tensors, provenance={"operation": "scale", "by": weight, "of": self.digest}
        )

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __sub__(self, other: Adapter) -> Adapter:
        return self + -other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        size = f"{len(self.tensors)} modules, {self.num_parameters:,} parameters"
        return f"Adapter({self.spec!r}, {size}, {self.digest[:12]})"

    def save(self, folder: str | Path) -> Path:
        """Write PEFT's layout plus `gossamer.json`, atomically. Raises `DiskError`; see docs/file-format.md."""
        from gossamer.files.peft import write_adapter

        return write_adapter(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read an adapter folder, strictly: every tensor consumed, every slot filled, the digest checked.

        Raises `AdapterFileError` with the nearest names; `UnsupportedError` for what this version refuses by name.
        """
        from gossamer.files.peft import read_adapter

        return read_adapter(Path(folder))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, whatever its dtype (numpy has no bfloat16); a view of it where it is contiguous."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype != torch.bfloat16:
        return plain.numpy().data.cast("B") if plain.numel() else memoryview(b"")
    return plain.view(-1).view(torch.uint8).numpy().data
