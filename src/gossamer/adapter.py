"""The Adapter value: a spec, named tensors, and where they came from.

An adapter is not a wrapper around a model. It is a value that can be added, scaled, compared, saved and attached:

    delta(path) = scaling(path) * B A        (out, in), the change of one weight matrix
    (a + b).delta(path) = a.delta(path) + b.delta(path)      exact: factors are concatenated, ranks add
"""

# pyright: reportUnnecessaryIsInstance=false
# (callers need not be typed, and hear what they gave)

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

_ABOUT_THE_BASE = ("base_model_name_or_path", "fan_in_fan_out", "task_type", "auto_mapping")


class Method(Spec):
    """What an adapter's spec knows about its own tensors; one class a method, registered in `gossamer.methods`."""

    name: ClassVar[str]

    @abstractmethod
    def delta(self, path: str, slots: Mapping[str, Tensor]) -> Tensor:
        """The change of the weight at `path`, (out, in); at least float32."""

    def idle(self, path: str, slots: Mapping[str, Tensor]) -> bool:
        """Whether the tensors at `path` change nothing, whatever the base: B of zeros, for example."""
        return False

    @abstractmethod
    def scaled(self, tensors: Tensors, weight: float) -> tuple[Method, Tensors]:
        """Spec and tensors of `weight` times the adapter."""

    @abstractmethod
    def summed(self, tensors: Tensors, other: Method, other_tensors: Tensors) -> tuple[Method, Tensors]:
        """Spec and tensors of the sum of two adapters; exact, or a typed refusal."""

    @abstractmethod
    def resized(
        self, tensors: Tensors, r: int | None, energy: float | None, pooled: bool
    ) -> tuple[Method, Tensors, dict[str, float], float]:
        """Spec and tensors at a lower rank, the relative error at each path, and that of all; see `Adapter.resize`."""

    def heading(self) -> dict[str, Any]:
        """The method's registered name."""
        return {"name": self.name}


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
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    foreign: Mapping[str, Any] = field(default_factory=dict[str, Any])

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
        hash_tensors(total, self.named_tensors())
        return total.hexdigest()

    @cached_property
    def idle_paths(self) -> tuple[str, ...]:
        """The modules at which it changes nothing; all of them, for an adapter that was never trained."""
        return tuple(path for path, slots in self.tensors.items() if path and self.spec.idle(path, slots))

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
        return Adapter(spec, tensors, self.base or other.base, origin, about_the_base(self.foreign))

    def __radd__(self, other: object) -> Adapter:
        return self if other == 0 else NotImplemented  # where Python's own sum() starts

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

    def resize(self, r: int | None = None, *, energy: float | None = None, pooled: bool = False) -> Adapter:
        """The nearest adapter of lower rank; `provenance` states its error.

            D_r = U_r diag(s_1 .. s_r) V_r^T        error^2 = (s_(r+1)^2 + ...) / (s_1^2 + ...)

        `scaling * B A = U diag(s) V^T` is found from the factors: QR of each and the SVD of the small core between
        them. The (out, in) matrix is never formed; cost O(rank^2 (in + out)) a module. The factors come back evenly
        balanced, with a scaling of 1, so that nothing of rsLoRA's alpha / sqrt(r) depends on the new rank.

        Args:
            r: the rank of every module; with `pooled`, the mean rank.
            energy: instead of r, the share of s_1^2 + s_2^2 + ... that is kept, in (0, 1].
            pooled: give the ranks to the largest singular values, whichever module they are in, rather than judge each
                module by itself; each keeps at least one.

        Returns:
            An adapter; its `provenance` holds "error" (relative, Frobenius norm over all modules) and "errors" (of each
            module). This adapter's own tensors where no module has a higher rank.

        Raises:
            UsageError: not exactly one of r and energy, or out of range.
            UnsupportedError: a method whose change is no product of factors, or parameters trained whole.
            NonFiniteError: factors that hold NaN or infinity.

        Source: Eckart and Young 1936.
        """
        if (r is None) == (energy is None):
            raise UsageError("resize takes a rank or an energy", got=f"r={r}, energy={energy}", expected="one of them")
        if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
            raise UsageError("a rank is a whole number of at least 1", got=repr(r))
        if energy is not None and not 0 < energy <= 1:
            raise UsageError("an energy is a share of the squared singular values", got=repr(energy), expected="(0, 1]")
        spec, tensors, errors, error = self.spec.resized(self.tensors, r, energy, pooled)
        origin = {"operation": "resize", "of": self.digest, "r": r, "energy": energy, "pooled": pooled}
        origin |= {"error": error, "errors": errors}
        kept = self.foreign if spec is self.spec else about_the_base(self.foreign)
        return replace(self, spec=spec, tensors=tensors, provenance=origin, foreign=kept)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        size = f"{len(self.tensors)} modules, {self.num_parameters:,} parameters"
        return f"Adapter({self.spec!r}, {size}, {self.digest[:12]})"

    def save(self, folder: str | Path, *, beside: bool = False) -> Path:
        """Write PEFT's layout plus `gossamer.json`, atomically; see docs/file-format.md.

        Args:
            beside: write into a folder of other things too, a Trainer's checkpoint for example, file by file.

        Raises `DiskError`; `StateError` for a folder that is not an adapter's, without `beside`.
        """
        from gossamer.files.peft import write_adapter, write_beside

        return (write_beside if beside else write_adapter)(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read an adapter folder, strictly: every tensor consumed, every slot filled, the digest checked.

        Raises `AdapterFileError` with the nearest names; `UnsupportedError` for what this version refuses by name.
        """
        from gossamer.files.peft import read_adapter

        return read_adapter(Path(folder))


def about_the_base(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """What a PEFT config says of the base, which is still true of an adapter computed from the one it describes."""
    return {key: value for key, value in foreign.items() if key in _ABOUT_THE_BASE}


def hash_tensors(total: Any, named: Mapping[str, Tensor]) -> None:
    """Feed names, dtypes, shapes and bytes to a hash, in the order given."""
    for name, tensor in named.items():
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, whatever its dtype (numpy has no bfloat16); a view of it where it is contiguous."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype != torch.bfloat16:
        return plain.numpy().data.cast("B") if plain.numel() else memoryview(b"")
    return plain.view(-1).view(torch.uint8).numpy().data
