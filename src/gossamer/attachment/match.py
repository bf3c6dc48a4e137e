"""Which modules a spec names. Every pattern must name something; otherwise an error with the nearest right names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from gossamer.adapter import Adapter
from gossamer.attachment import walk
from gossamer.attachment.bypass import Bypass, bypassed
from gossamer.attachment.fitness import MEANT_FOR_ALL, Fitness, fitness, heads, left_out, refuse_barred
from gossamer.attachment.kinds import looks_like, shape_of, why_not
from gossamer.errors import TargetError, UnsupportedError, nearest
from gossamer.methods import Shape, TargetedMethod
from gossamer.methods.base import LINEAR_KINDS
from gossamer.methods.roles import role_of
from gossamer.methods.targeted import matches_end

Paths = Mapping[str, list[str]]

_STACKED = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
"""What the linear modules of single experts were called before transformers 5 stacked them."""


@dataclass(frozen=True)
class Selection:
    """The canonical paths a spec names, by the part they play; sorted as the model orders them.

    Attributes:
        targets: where the method's own layers stand; `saved`: modules trained whole; `biased`: biases trained alone.
        tokens: embedding -> the rows of it that are trained whole.
        modules, shapes: of all of them; shapes of experts and attention hold the matrices to adapt, and those of
            targets what they store in common.
        aliases: how many names a module has, for those that have several.
        bypass: of the whole model, the modules whose parameters are used without calling them.
        idle: path -> why layers have no effect there: targets of a stored adapter whose change must be zero.
        notes: what was left out, and why.
    """

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    biased: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, Shape]
    aliases: Mapping[str, int]
    bypass: Mapping[str, Bypass] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def target_set(self) -> frozenset[str]:
        """The targets, to look paths up in."""
        return frozenset(self.targets)

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.targets, *self.saved, *self.biased, *self.tokens)


def select(model: nn.Module, spec: TargetedMethod, stored: Adapter | None = None) -> Selection:
    """Resolve a spec's patterns on a model.

    Args:
        stored: the adapter whose spec it is; then modules that it has tensors for are not left out.

    Raises: TargetError for every pattern that names nothing adaptable; UnsupportedError for a module that is named and
        where a layer would not mean what it says.
    """
    modules, names = walk.modules_and_names(model)
    shapes = {path: shape_of(path, module) for path, module in modules.items()}
    bypass = bypassed(modules)
    saved = _saved(spec, modules, names)
    fit = fitness(spec, model, modules, {path: shapes[path] for path in shapes if path not in saved}, bypass)
    held = frozenset(stored.tensors if stored else ())
    matrices = _matrices(spec, shapes, names)
    targets = _targets(spec, model, shapes, modules, fit, names, held)
    chosen = {*targets, *matrices}
    targets = _in_layers(spec, _excluded(spec, [path for path in shapes if path in chosen], names, fit, held))
    idle = {path: fit.barred[path] for path in targets if path in fit.barred and path in held and shapes[path].kind}
    if stored is not None:  # what the file leaves out is left out
        targets = [path for path in targets if path not in fit.barred or path in held]
    refuse_barred([path for path in targets if path not in idle], fit, modules)
    notes = _notes(spec, model, modules, fit, targets)
    if not targets:
        raise TargetError(
            "no module is left to adapt",
            got=f"target_modules={spec.target_modules!r}, exclude_modules={spec.exclude_modules!r}",
            expected=_choices(fit.able) if fit.able else f"{spec.name} stands at {spec.stands_at}",
            hint="; ".join(notes),
        )
    _check_patterns(spec, [*targets, *(f"{path}.{name}" for path in targets for name in shapes[path].matrices)])
    _refuse_bypassed([*targets, *saved], modules)
    tokens = _tokens(spec, model, modules, shapes, names)
    for path in tokens:
        if path in targets or path in saved:
            raise TargetError("trainable_tokens names a module that is adapted or trained whole already", where=path)
    owning = [path for path, module in modules.items() if _owns_bias(module) and path not in {*targets, *saved}]
    biased = spec.bias_modules(targets, owning)
    _refuse_bypassed(biased, modules)
    everything = (*targets, *saved, *biased, *tokens)
    for path in {*matrices}.intersection(targets):
        shapes[path] = shape_of(path, modules[path], matrices[path])
    return Selection(
        tuple(targets),
        tuple(saved),
        tuple(biased),
        tokens,
        {path: modules[path] for path in everything},
        {path: shapes[path] for path in everything} | _with_ties([shapes[path] for path in targets]),
        {path: len(names[path]) for path in everything if len(names[path]) > 1},
        bypass,
        idle,
        notes,
    )


def _notes(
    spec: TargetedMethod, model: nn.Module, modules: Mapping[str, nn.Module], fit: Fitness, targets: list[str]
) -> tuple[str, ...]:
    """What a pattern that means all modules left out, of those that it means."""
    if spec.target_modules not in MEANT_FOR_ALL:
        return ()
    why = {**fit.barred, **fit.aside}
    gone = [path for path in fit.nameable if path in why and path not in targets]
    if spec.target_modules == "all-linear":
        kinds, ends = (*LINEAR_KINDS, "attention"), heads(model, modules)
        gone = [path for path in gone if looks_like(modules[path]) in kinds and path not in ends]
    return left_out(gone, why, spec)


def _with_ties(shapes: Iterable[Shape]) -> dict[str, Shape]:
    """Shapes that know which of their parameters another one of them holds already."""
    first: dict[int, tuple[str, str]] = {}
    found: dict[str, Shape] = {}
    for shape in shapes:
        tied: dict[str, tuple[str, str]] = {}
        for name, parameter in shape.parameters.items():
            known = first.setdefault(id(parameter), (shape.path, name))
            if known != (shape.path, name):
                tied[name] = known
        found[shape.path] = replace(shape, tied=tied) if tied else shape
    return found


def _ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def _named_by(pattern: str, candidates: Iterable[str], names: Mapping[str, list[str]]) -> list[str]:
    """Candidates of which any name ends with `pattern`."""
    return [path for path in candidates if any(_ends_with(name, pattern) for name in names[path])]


def _targets(
    spec: TargetedMethod,
    model: nn.Module,
    shapes: Mapping[str, Shape],
    modules: Mapping[str, nn.Module],
    fit: Fitness,
    names: Paths,
    held: frozenset[str],
) -> list[str]:
    pattern = spec.target_modules
    if pattern in MEANT_FOR_ALL:
        by_itself = [path for path in fit.able if path in held or path not in fit.aside]
        known = [*by_itself, *(path for path in fit.barred if path in held)]
        left = {path for path in known if _attention_around(path, modules)}
        if pattern == "auto":
            return [path for path in known if path not in left and (not spec.roles or role_of(path) in spec.roles)]
        left |= heads(model, modules)
        return [path for path in known if shapes[path].kind in (*LINEAR_KINDS, "attention") and path not in left]
    if isinstance(pattern, str):
        found = [path for path in fit.nameable if any(re.fullmatch(pattern, name) for name in names[path])]
        if not found:
            raise TargetError(
                "the target expression matches no adaptable module", got=pattern, expected=_choices(fit.able)
            )
        return found
    chosen: set[str] = set()
    for entry in pattern:
        found = _named_by(entry, fit.nameable, names)
        if not found and not _stacked_by(entry, shapes):
            raise _unmatched("target_modules", entry, _named_by(entry, modules, names), modules, fit.able)
        chosen.update(found)
    return [path for path in fit.nameable if path in chosen]


def _stacked_by(entry: str, shapes: Mapping[str, Shape]) -> list[str]:
    """The experts whose stacked matrices took the place of the linear modules that `entry` used to name."""
    return [path for path, shape in shapes.items() if shape.kind == "experts" and _STACKED.get(entry) in shape.matrices]


def _matrices(spec: TargetedMethod, shapes: Mapping[str, Shape], names: Paths) -> dict[str, tuple[str, ...]]:
    """Path of experts or attention -> those of their matrices that are named one by one."""
    stacked = {path: shape for path, shape in shapes.items() if shape.matrices}
    chosen: dict[str, set[str]] = {}
    for entry in getattr(spec, "target_parameters", ()):
        found = [
            (path, matrix)
            for path, shape in stacked.items()
            for matrix in shape.matrices
            if any(_ends_with(f"{name}.{matrix}", entry) for name in names[path])
        ]
        if not found:
            known = [f"{path}.{matrix}" for path, shape in stacked.items() for matrix in shape.matrices]
            raise TargetError(
                f"target_parameters: {entry!r} matches no stacked matrix",
                expected=_choices(known) if known else "a model with stacked experts",
                hint=_hint(entry, known) or "a module's own weight is adapted by target_modules",
            )
        for path, matrix in found:
            chosen.setdefault(path, set()).add(matrix)
    pattern = spec.target_modules
    for entry in pattern if isinstance(pattern, tuple) else ():
        if not any(_ends_with(path, entry) for path in shapes):
            for path in _stacked_by(entry, shapes):
                chosen.setdefault(path, set()).add(_STACKED[entry])
    return {path: tuple(sorted(matrices)) for path, matrices in chosen.items()}


def _tokens(
    spec: TargetedMethod,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, Shape],
    names: Paths,
) -> dict[str, tuple[int, ...]]:
    """Embedding -> rows of it to train whole, checked."""
    wanted = spec.trainable_tokens
    if isinstance(wanted, tuple):
        getter = getattr(model, "get_input_embeddings", None)
        embedding = getter() if getter and wanted else None
        if wanted and embedding is None:
            raise TargetError(
                "trainable_tokens without a name means the input embedding, which this model does not tell",
                hint='name it: {"embed_tokens": [...]}',
            )
        wanted = {path: wanted for path in shapes if wanted and modules[path] is embedding}
    found: dict[str, tuple[int, ...]] = {}
    embeddings = [path for path, shape in shapes.items() if shape.kind == "embedding"]
    for entry, rows in wanted.items():
        paths = [entry] if entry in embeddings else _named_by(entry, embeddings, names)
        if not paths:
            for path in _named_by(entry, modules, names):
                if looks_like(modules[path]) == "embedding":
                    raise UnsupportedError(
                        "rows of it cannot be trained: " + why_not(modules[path], "embedding"), where=path
                    )
            raise TargetError(
                f"trainable_tokens: {entry!r} is no embedding",
                expected=_choices(embeddings),
                hint=_hint(entry, embeddings),
            )
        for path in paths:
            count = shapes[path].in_features
            wrong = [row for row in rows if not 0 <= row < count]
            if wrong or len(set(rows)) < len(rows) or not rows:
                raise TargetError(
                    "trainable_tokens are different rows of the embedding",
                    where=path,
                    got=str(wrong or rows),
                    expected=f"rows 0..{count - 1}, each once",
                    hint="new tokens need model.resize_token_embeddings first" if wrong else "",
                )
            found[path] = tuple(rows)
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
    whole = [path for path in modules if path in chosen]
    return [path for path in whole if _attention_around(path, modules) not in chosen]  # it trains its parts itself


def _excluded(spec: TargetedMethod, targets: list[str], names: Paths, fit: Fitness, held: frozenset[str]) -> list[str]:
    """Targets without those that `exclude_modules` names, themselves or by a module they are in.

    A stored adapter's tensors inside a module that is excluded stay: other tools mean the named modules alone.
    """
    pattern = spec.exclude_modules
    entries = [] if pattern == () else [pattern] if isinstance(pattern, str) else [*pattern]
    gone: set[str] = set()
    for entry in entries:

        def named(path: str, inside: bool, entry: str = entry) -> bool:
            ways = [way for name in names[path] for way in (_parents(name) if inside else (name,))]
            return any(re.fullmatch(entry, way) if isinstance(pattern, str) else _ends_with(way, entry) for way in ways)

        found = [path for path in targets if named(path, path not in held)]
        if not found and not any(named(path, True) for path in (*targets, *fit.aside, *fit.barred)):
            if isinstance(pattern, str):
                raise TargetError("exclude_modules excludes nothing", got=pattern, expected=_choices(targets))
            raise _unmatched("exclude_modules", entry, [], {}, targets)
        gone.update(found)
    return [path for path in targets if path not in gone]


def _parents(name: str) -> list[str]:
    """A path and those of the modules that hold it: "a.b.c", "a", "a.b"."""
    return [name, *(name[:end] for end, letter in enumerate(name) if letter == ".")]


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
    for kind in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, kind, {}):
            if not any(matches_end(pattern, path) for path in targets):
                raise TargetError(
                    f"{kind} has an entry that matches no adapted module", got=pattern, hint=_hint(pattern, targets)
                )


def _attention_around(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The torch attention that uses this module's weight without calling it."""
    owner = path.rpartition(".")[0]
    return owner if isinstance(modules.get(owner), nn.MultiheadAttention) else None


def _refuse_bypassed(chosen: list[str], modules: Mapping[str, nn.Module]) -> None:
    for path in chosen:
        if isinstance(modules[path], nn.RNNBase):
            raise UnsupportedError(
                "torch's recurrent modules run on a flat copy of their weights, so nothing can stand in for those",
                where=path,
                got=type(modules[path]).__name__,
            )
        owner = _attention_around(path, modules)
        if owner is not None:
            raise UnsupportedError(
                "MultiheadAttention uses this module's weight without calling it",
                where=path,
                hint=f"adapt the attention itself: {owner or 'the model'}",
            )


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
    field: str, entry: str, present: list[str], modules: Mapping[str, nn.Module], adaptable: Iterable[str]
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
