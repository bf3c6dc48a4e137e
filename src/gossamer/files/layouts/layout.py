"""What a layout is: how the tensors of one PEFT type are named, and how its config and our specs translate."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError, SpecError, UnsupportedError, nearest
from gossamer.methods import METHODS, TargetedMethod
from gossamer.methods.targeted import exactly

PREFIX = "base_model.model."

DESCRIPTIVE = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": None,
    "revision": None,
    "task_type": None,
}
"""Keys of every PEFT config that change nothing about how the tensors act; kept as they are."""

_NOTHING: tuple[Any, ...] = (None, False, {}, [])
"""What says nothing, whatever the key: a feature of a newer or another PEFT that is off."""


class Layout(ABC):
    """One PEFT type, both ways. What a class does not say about names is PEFT's common rule: prefix, path, slot."""

    peft_type: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    """Names of the methods that are written in it."""
    complete: ClassVar[bool] = True
    """Whether the config says all that there is to say about the tensors."""
    slots: ClassVar[tuple[str, ...]] = ()
    """What a module's own tensors are called, here and in the file."""
    modelled: ClassVar[Mapping[str, Any]]
    """Keys that a spec says something about, with PEFT's defaults."""
    descriptive: ClassVar[Mapping[str, Any]] = {}
    """Further keys that change nothing about how the tensors act."""
    inert: ClassVar[Mapping[str, Any]] = {}
    """Keys that matter in training alone, with PEFT's defaults: kept, and nothing is made of them."""
    refused: ClassVar[Mapping[str, Any]] = {}
    """Features that are refused by name when set to anything but this default of PEFT's."""
    assumed: ClassVar[tuple[str, ...]] = ()
    """Keys whose absence changes how the tensors act: PEFT's default is taken, with a warning."""

    @property
    def known(self) -> dict[str, Any]:
        """Every key that PEFT writes, with its default."""
        return {
            "peft_type": self.peft_type,
            **self.modelled,
            **DESCRIPTIVE,
            **self.descriptive,
            **self.inert,
            **self.refused,
        }

    def can_say(self, spec: TargetedMethod) -> bool:
        """Whether PEFT has a place for all that the spec says."""
        return not spec.trainable_tokens

    # Reading ---------------------------------------------------------------------------------------------------------

    def check_keys(self, config: Mapping[str, Any], where: str) -> None:
        """Refuse features that are not covered and keys that look misspelt; say what is assumed or not understood."""
        for key, default in self.refused.items():
            if config.get(key, default) not in (default, *_NOTHING):
                raise UnsupportedError("this PEFT feature is not covered", where=where, got=f"{key}={config[key]!r}")
        known = self.known
        unknown = [key for key in config if key not in known and config[key] not in _NOTHING]
        for key in unknown:
            hint = nearest(key, known, count=1, cutoff=0.8)
            if hint:
                expected = f"the keys of peft_type={self.peft_type!r}"
                raise AdapterFileError(
                    "a config key that looks misspelt", where=where, got=key, expected=expected, hint=hint
                )
        absent = [f"{key}={known[key]!r}" for key in self.assumed if key not in config]
        if absent:
            warnings.warn(f"{where}: missing keys, PEFT's defaults are taken: {', '.join(absent)}", stacklevel=2)
        if unknown:
            warnings.warn(f"{where}: keys kept but not understood: {', '.join(sorted(unknown))}", stacklevel=2)

    def sorted_out(self, stored: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Tensors:
        """The file's tensors by module and slot. Raises `AdapterFileError` for a name outside the model."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in stored.items():
            path, slot = self.split(name, where)
            place(tensors, path, slot, tensor, f"{where}: {name}")
        return tensors

    def split(self, name: str, where: str) -> tuple[str, str]:
        """Module path and slot of a tensor's name."""
        path, _, slot = inside(name, PREFIX, where).rpartition(".")
        return path, slot

    def renewed(self, config: dict[str, Any], tensors: Tensors, where: str) -> tuple[dict[str, Any], Tensors]:
        """A file of an older layout, in today's."""
        return config, tensors

    def spec(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> TargetedMethod:
        """The spec that a config describes, tensors being what it came with. Raises `AdapterFileError`."""
        saved = {"modules_to_save": _saved(config.get("modules_to_save") or (), self.whole(tensors))}
        fields = self.targeted(config, tensors, where) | saved | self.fields(config, where)
        try:
            return METHODS[self.method(config)].from_dict(fields)
        except SpecError as error:
            faults = "; ".join(error.faults)
            raise AdapterFileError("the adapter's config is not valid", where=where, got=faults) from None

    def targeted(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> dict[str, Any]:
        """The fields that name modules."""
        if config.get("target_modules") is None:
            raise AdapterFileError(
                "the config does not say what its targets are", where=where, expected="target_modules"
            )
        found = {
            "target_modules": config["target_modules"],
            "exclude_modules": config.get("exclude_modules") or (),
            "layers_to_transform": config.get("layers_to_transform"),
        }
        if config.get("layers_pattern"):  # says which number in a path is the layer's; the tensors' paths say it too
            if found["layers_to_transform"] is None:
                raise AdapterFileError("layers_pattern without layers_to_transform", where=where)
            found |= {"target_modules": exactly(self.named_targets(tensors)), "layers_to_transform": None}
        return found

    def method(self, config: Mapping[str, Any]) -> str:
        """Name of the method that a config of this type means."""
        return self.methods[0]

    @abstractmethod
    def fields(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The method's own fields."""

    def check(self, tensors: Tensors, spec: TargetedMethod, where: str) -> None:
        """Every module's tensors are what the spec says they are, and complete. Raises `AdapterFileError`."""
        targets = self.targets(tensors)
        for path, slots in tensors.items():
            if path in targets:
                self.check_module(path, slots, spec, where)
            elif not self.accounted(path, slots, spec):
                self.refuse(path, slots, targets, where)
        if not targets:
            first = ", ".join([*tensors][:4])
            raise AdapterFileError(f"the file holds no tensors of peft_type={self.peft_type!r}", where=where, got=first)

    def check_module(self, path: str, slots: Mapping[str, Tensor], spec: TargetedMethod, where: str) -> None:
        """The tensors of one target, complete and nothing else."""
        if set(slots) != set(self.slots):
            named = ", ".join(self.slots)
            raise AdapterFileError(
                "a module with other tensors than the method has",
                where=f"{where}: {path}",
                got=", ".join(slots),
                expected=named,
            )

    def accounted(self, path: str, slots: Mapping[str, Tensor], spec: TargetedMethod) -> bool:
        """Whether the spec names the tensors of a module that is no target."""
        return is_saved(path, spec)

    def refuse(self, path: str, slots: Mapping[str, Tensor], targets: Collection[str], where: str) -> NoReturn:
        """Refuse tensors that nothing in the config names."""
        raise AdapterFileError(
            "a tensor that the config does not account for",
            where=f"{where}: {path}.{next(iter(slots))}",
            expected=f"tensors of peft_type={self.peft_type!r}, or parameters of modules_to_save",
            hint=nearest(path, targets),
        )

    def targets(self, tensors: Tensors) -> dict[str, Mapping[str, Tensor]]:
        """The modules that carry the method's own tensors."""
        return {path: slots for path, slots in tensors.items() if any(slot in slots for slot in self.slots) and path}

    def whole(self, tensors: Tensors) -> list[str]:
        """The modules whose own parameters were trained."""
        targets = self.targets(tensors)
        return [path for path in tensors if path and path not in targets]

    # Writing ---------------------------------------------------------------------------------------------------------

    def written(self, adapter: Adapter) -> tuple[TargetedMethod, Tensors]:
        """Spec and tensors as the file says them, where that is not as the adapter does."""
        assert isinstance(adapter.spec, TargetedMethod)
        return adapter.spec, adapter.tensors

    def restored(self, spec: TargetedMethod, tensors: Tensors) -> Tensors:
        """What `written` was made of, bit for bit; spec is the adapter's own."""
        return tensors

    def name(self, path: str, slot: str, spec: TargetedMethod, slots: Mapping[str, Tensor]) -> str:
        """A tensor's name in the file; `slots` are all of the module's."""
        return f"{PREFIX}{path}.{slot}"

    def config(self, adapter: Adapter, where: str) -> dict[str, Any]:
        """The PEFT config; the one the adapter was read from, unchanged, where that still says the same."""
        spec, tensors = self.written(adapter)
        foreign, known = adapter.foreign, self.known
        facts = self.facts(adapter, tensors)
        if foreign.get("peft_type") == self.peft_type:
            if self._means(foreign, spec, tensors, where):
                return dict(foreign) | {key: facts[key] for key in facts if foreign.get(key, known[key]) != facts[key]}
        else:
            foreign = {key: value for key, value in foreign.items() if key in known}
        defaults = {key: value for key, value in known.items() if key != "peft_version"}
        modelled = self.targeting(spec, tensors) | self.said(spec, tensors) | facts
        return defaults | dict(foreign) | {key: modelled[key] for key in modelled if key in known}

    def _means(self, foreign: Mapping[str, Any], spec: TargetedMethod, tensors: Tensors, where: str) -> bool:
        """Whether a config still describes the spec."""
        try:
            return self.spec(foreign, tensors, where) == spec
        except AdapterFileError:
            return False

    @abstractmethod
    def said(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        """What the config says for the method's own fields."""

    def facts(self, adapter: Adapter, tensors: Tensors) -> dict[str, Any]:
        """Keys that the tensors decide and no spec."""
        return {}

    def targeting(self, spec: TargetedMethod, tensors: Tensors) -> dict[str, Any]:
        """The keys that name modules; written out where PEFT would resolve the spec's own differently."""
        resolved = self.resolved(spec, tensors)
        targets = exactly(self.named_targets(tensors)) if resolved else spec.target_modules
        saved = _roots([path for path in self.whole(tensors) if is_saved(path, spec)])
        return {
            "target_modules": listed(targets),
            "exclude_modules": None if resolved else listed(spec.exclude_modules) or None,
            "layers_to_transform": None if resolved else listed(spec.layers_to_transform),
            "layers_pattern": None,
            "modules_to_save": saved or None,
        }

    def named_targets(self, tensors: Tensors) -> list[str]:
        """The modules that `target_modules` names."""
        return [*self.targets(tensors)]

    def resolved(self, spec: TargetedMethod, tensors: Tensors) -> bool:
        """Whether the config names every target by its path, because PEFT cannot say, or not so, what the spec says."""
        pattern = spec.target_modules
        if pattern in ("all-linear", "auto") or (spec.exclude_modules and "exclude_modules" not in self.modelled):
            return True
        numbers = "layers_to_transform" in self.modelled and not isinstance(pattern, str)
        return spec.layers_to_transform is not None and not (numbers and _numbered(self.named_targets(tensors)))


def inside(name: str, prefix: str, where: str) -> str:
    """A tensor's name without the prefix that it must have."""
    if not name.startswith(prefix):
        expected = f"names that begin with {prefix!r}"
        raise AdapterFileError("a tensor outside the model", where=f"{where}: {name}", expected=expected)
    return name[len(prefix) :]


def place(tensors: dict[str, dict[str, Tensor]], path: str, slot: str, tensor: Tensor, where: str) -> None:
    """Put a tensor in its place, which must be free."""
    slots = tensors.setdefault(path, {})
    if slot in slots:
        raise AdapterFileError("two tensors for one place", where=where, got=f"{path}.{slot}")
    slots[slot] = tensor


def is_saved(path: str, spec: TargetedMethod) -> bool:
    """Whether `modules_to_save` names the module, or one that it is a part of."""
    return any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", path) for entry in spec.modules_to_save)


def listed(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def plain_number(number: float) -> float | int:
    """A whole number as PEFT would write it."""
    return int(number) if float(number).is_integer() else number


def _saved(entries: Any, whole: Collection[str]) -> Any:
    """`modules_to_save` in our sense: suffixes after a dot.

    PEFT adds both "classifier" and "score" to a classifier's list, of which a model has one; and its "norm" takes
    every `input_layernorm` too.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return entries  # the spec says what is wrong with it
    names = {part for path in whole for part in path.split(".")}
    kept = [entry for entry in entries if entry not in ("classifier", "score") or entry in names]
    loose = sorted({name for entry in kept for name in names if name.endswith(entry) and name not in kept})
    return list(dict.fromkeys([*kept, *loose]))


def _roots(paths: list[str]) -> list[str]:
    """The paths that are not below another one; whole, so that PEFT's looser rule takes nothing else."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _numbered(targets: Sequence[str]) -> bool:
    """Whether PEFT finds the layer's number in every path; it wants two names before it."""
    return all(re.match(r".*?\.[^.]*\.\d+\.", path) for path in targets)
