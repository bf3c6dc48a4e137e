"""Which modules a spec names. Every pattern must name something; otherwise an error with the nearest right names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from gossamer.attachment import walk
from gossamer.attachment.site import kind_of
from gossamer.errors import TargetError, UnsupportedError, nearest
from gossamer.methods import TargetedMethod
from gossamer.methods.lora import matches_end


@dataclass(frozen=True)
class Selection:
    """The canonical paths a spec names, by the part they play; sorted as the model orders them."""

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    biased: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.targets, *self.saved, *self.biased)


def select(model: nn.Module, spec: TargetedMethod) -> Selection:
    """Resolve a spec's patterns on a model. Raises `TargetError` for every pattern that names nothing adaptable."""
    modules = walk.modules(model)
    names = {paths[0]: paths for paths in walk.aliases(model).values()}
    saved = _saved(spec, modules, names)
    adaptable = [path for path, module in modules.items() if path and kind_of(module) and path not in saved]
    targets = _targets(spec, model, modules, adaptable, names)
    targets = _excluded(spec, targets, names)
    targets = _in_layers(spec, targets)
    if not targets:
        raise TargetError(
            "no module is left to adapt",
            got=f"target_modules={spec.target_modules!r}, exclude_modules={spec.exclude_modules!r}",
        )
    _check_patterns(spec, targets)
    _refuse_bypassed(targets, modules)
    biased = [
        path for path, module in modules.items() if _owns_bias(module) and path not in targets and path not in saved
    ]
    return Selection(tuple(targets), tuple(saved), tuple(spec.bias_modules(targets, biased)))


def _ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def _named_by(pattern: str, candidates: Iterable[str], names: Mapping[str, list[str]]) -> list[str]:
    """Candidates of which any name ends with `pattern`."""
    return [path for path in candidates if any(_ends_with(name, pattern) for name in names[path])]


def _targets(
    spec: TargetedMethod,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    adaptable: list[str],
    names: Mapping[str, list[str]],
) -> list[str]:
    pattern = spec.target_modules
    if pattern == "all-linear":
        return [path for path in adaptable if path not in heads(model, modules)]
    if isinstance(pattern, str):
        found = [path for path in adaptable if any(re.fullmatch(pattern, name) for name in names[path])]
        if not found:
            raise TargetError(
                "the target expression matches no adaptable module", got=pattern, expected=_choices(adaptable)
            )
        return found
    chosen: set[str] = set()
    for entry in pattern:
        found = _named_by(entry, adaptable, names)
        if not found:
            raise _unmatched("target_modules", entry, _named_by(entry, modules, names), modules, adaptable)
        chosen.update(found)
    return [path for path in adaptable if path in chosen]


def heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the head: the output embeddings and, in a transformers model, all that stands outside its base."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    found = {path for path, module in modules.items() if module is head}
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        inside = {id(module) for module in body.modules()}
        found |= {path for path, module in modules.items() if id(module) not in inside}
    return found


def _saved(spec: TargetedMethod, modules: Mapping[str, nn.Module], names: Mapping[str, list[str]]) -> list[str]:
    """Every module with parameters of its own at or below a module that `modules_to_save` names."""
    chosen: set[str] = set()
    for entry in spec.modules_to_save:
        roots = _named_by(entry, modules, names)
        owners = [path for path in modules if any(path == root or path.startswith(root + ".") for root in roots)]
        owners = [path for path in owners if any(True for _ in modules[path].parameters(recurse=False))]
        if not owners:
            raise _unmatched("modules_to_save", entry, roots, modules, [path for path in modules if path])
        chosen.update(owners)
    return [path for path in modules if path in chosen]


def _excluded(spec: TargetedMethod, targets: list[str], names: Mapping[str, list[str]]) -> list[str]:
    pattern = spec.exclude_modules
    if isinstance(pattern, str):
        gone = {path for path in targets if any(re.fullmatch(pattern, name) for name in names[path])}
        if not gone:
            raise TargetError("exclude_modules excludes nothing", got=pattern, expected=_choices(targets))
    else:
        gone = set()
        for entry in pattern:
            found = _named_by(entry, targets, names)
            if not found:
                raise _unmatched("exclude_modules", entry, [], {}, targets)
            gone.update(found)
    return [path for path in targets if path not in gone]


def _in_layers(spec: TargetedMethod, targets: list[str]) -> list[str]:
    wanted = spec.layers_to_transform
    if wanted is None:
        return targets
    wanted = (wanted,) if isinstance(wanted, int) else wanted
    layer_of = {path: next((int(part) for part in path.split(".") if part.isdigit()), None) for path in targets}
    present = sorted({index for index in layer_of.values() if index is not None})
    missing = [index for index in wanted if index not in present]
    if missing:
        span = f"{present[0]}..{present[-1]}" if present else "no numbered layers"
        raise TargetError(
            "layers_to_transform names layers that this model does not have", got=str(missing), expected=span
        )
    return [path for path in targets if layer_of[path] in wanted]


def _check_patterns(spec: TargetedMethod, targets: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, field, {}):
            if not any(matches_end(pattern, path) for path in targets):
                raise TargetError(
                    f"{field} has an entry that matches no adapted module", got=pattern, hint=_hint(pattern, targets)
                )


def _refuse_bypassed(targets: list[str], modules: Mapping[str, nn.Module]) -> None:
    """torch's own attention and encoder layers use their parts' weights without calling the parts."""
    for owner, module in modules.items():
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            inside = [path for path in targets if path.startswith(f"{owner}." if owner else "")]
            if inside:
                kind = type(module).__name__
                raise UnsupportedError(f"{kind} uses this module's weight without calling it", where=inside[0])


def _owns_bias(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("bias"), nn.Parameter)


def _suffixes(paths: Iterable[str]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def _choices(paths: Iterable[str]) -> str:
    return "one of " + ", ".join(_suffixes(paths))


def _hint(pattern: str, paths: Iterable[str]) -> str:
    paths = [*paths]
    return nearest(pattern.rsplit(".", 1)[-1], _suffixes(paths)) or nearest(pattern, paths)


def _unmatched(
    field: str, entry: str, present: list[str], modules: Mapping[str, nn.Module], adaptable: list[str]
) -> TargetError:
    if present:
        kind = type(modules[present[0]]).__name__
        inside = [path for path in adaptable if any(path.startswith(root + ".") for root in present)]
        hint = (
            f"the adaptable modules inside it: {', '.join(_suffixes(inside))}"
            if inside
            else "modules_to_save can train it whole"
        )
        return TargetError(f"{field}: {entry!r} names a {kind}, which cannot be adapted", where=present[0], hint=hint)
    return TargetError(
        f"{field}: {entry!r} matches no module", expected=_choices(adaptable), hint=_hint(entry, adaptable)
    )
