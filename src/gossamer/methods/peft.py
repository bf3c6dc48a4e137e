"""How PEFT stores a method: its type, the names of its tensors and the keys of its config, as one table a method.

`gossamer.files` reads and writes what the tables say. A method without one is stored under a type of our own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError

PREFIX = "base_model.model."
"""How the names of a module's tensors begin."""
TARGETS = ("target_modules", "modules_to_save")
LAYERS = ("layers_to_transform", "layers_pattern")
EXCLUDED = ("exclude_modules",)
DESCRIPTIVE: Mapping[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": None,
    "revision": None,
    "task_type": None,
}
"""Keys of every PEFT config that change nothing about how the tensors act; kept as they are."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a config is written for.

    Attributes:
        adapter: spec and tensors as the file says them.
        targets: paths of the modules that carry the method's own tensors.
        parameters: whole paths of the matrices that `target_parameters` must name.
        resolved: whether the config names every target by its path.
    """

    adapter: Adapter
    targets: Sequence[str]
    parameters: Sequence[str]
    resolved: bool

    @property
    def spec(self) -> Any:
        """The method's spec."""
        return self.adapter.spec


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """A key of a config.

    Attributes:
        default: PEFT's.
        field: the spec's field that it says; "" for none.
        values: PEFT's value -> the field's, where they differ.
        read: PEFT's value and where it stands -> the field's; raises for a value that is not covered.
        write: what the config says; without it the field's value. A key without a field that has it is a fact, which
            the tensors decide and no spec.
    """

    default: Any
    field: str = ""
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Any, str], Any] | None = None
    write: Callable[[Stored], Any] | None = None


Check = Callable[[Any, str, Mapping[str, Tensor], str], None]


@dataclasses.dataclass(frozen=True)
class PeftLayout:
    """One PEFT type, as a table. A method's own: a subclass computes something else until it says otherwise.

    Attributes:
        peft_type: as the config says it.
        slots: slot of a target -> how its name in the file ends after the module's path.
        whole_model: slot that belongs to no module -> its name in the file.
        others: further endings of names: of what stands beside the slots, and earlier ones.
        prefix: of the names of modules' tensors.
        mark: what stands before the names of a target's own parameters, in the file alone.
        keys: of the config, beside those that name modules.
        targeting: the keys that name modules.
        given: what tells the method from others of its type.
        assumed: keys whose absence changes how the tensors act: PEFT's default is taken, with a warning.
        descriptive: further keys that change nothing about how the tensors act.
        inert: keys that matter in training alone, with PEFT's defaults: kept, and nothing is made of them.
        refused: features that are refused by name when set to anything but this default of PEFT's.
        factored: whether the slots are pairs of factors, also of matrices that a module uses itself.
        resolved: whether PEFT cannot say, or not so, which modules the spec's patterns name.
        check: spec, path, slots and where they stand; raises where they are not what the spec says.
        encode: spec and tensors -> as the file says them, where that is not as the adapter does.
        decode: the adapter's spec and the file's tensors -> the adapter's tensors, bit for bit.
        complete: whether the config says all that there is to say about the tensors.
    """

    peft_type: str
    slots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    whole_model: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: tuple[tuple[str, str], ...] = ()
    prefix: str = PREFIX
    mark: str = ""
    keys: Mapping[str, ConfigKey] = dataclasses.field(default_factory=dict)
    targeting: tuple[str, ...] = ()
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    descriptive: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inert: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    factored: bool = False
    resolved: Callable[[Any], bool] = lambda spec: False
    check: Check | None = None
    encode: Callable[[Any, Tensors], tuple[Any, Tensors]] = lambda spec, tensors: (spec, tensors)
    decode: Callable[[Any, Tensors], Tensors] = lambda spec, tensors: tensors
    complete: bool = True

    @property
    def endings(self) -> tuple[tuple[str, str], ...]:
        """Slot and ending of every name that is no plain one; today's before earlier ones."""
        return (*self.slots.items(), *self.others)

    @property
    def known(self) -> dict[str, Any]:
        """Every key that PEFT writes, with its default."""
        keys = {name: key.default for name, key in self.keys.items()}
        named = dict.fromkeys(self.targeting) | keys
        return {"peft_type": self.peft_type, **DESCRIPTIVE, **named, **self.descriptive, **self.inert, **self.refused}


def plain(*slots: str) -> dict[str, str]:
    """Slots whose names in the file are their own."""
    return {slot: f".{slot}" for slot in slots}


def listed(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def check_names(slots: Mapping[str, Tensor], expected: Mapping[str, str], where: str) -> None:
    """Raise `AdapterFileError` unless a module has exactly these slots."""
    if set(slots) != set(expected):
        what = "a module with other tensors than the method has"
        raise AdapterFileError(what, where=where, got=", ".join(slots), expected=", ".join(expected))


def token_rows(path: str, wanted: Any) -> tuple[int, ...]:
    """The rows that `trainable_tokens` names of the embedding at a path."""
    if not isinstance(wanted, dict):
        return wanted
    ends = (rows for entry, rows in wanted.items() if path.endswith(f".{entry}"))
    return wanted[path] if path in wanted else next(ends, ())
