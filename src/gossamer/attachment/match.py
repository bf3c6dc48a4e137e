"""Which modules a spec names. Every pattern must name something; otherwise an error with the nearest right names."""

import re
from collections.abc import Iterable

from torch import nn

from gossamer.adapter import Adapter
from gossamer.attachment import walk
from gossamer.attachment.bypass import bypassed
from gossamer.attachment.fitness import MEANT_FOR_ALL, fitness, heads, left_out, refuse_barred
from gossamer.attachment.kinds import looks_like, shape_of, why_not
from gossamer.attachment.selection import Selection, with_ties
from gossamer.errors import TargetError, UnsupportedError, nearest
from gossamer.methods import TargetedMethod
from gossamer.methods.base import LINEAR_KINDS
from gossamer.methods.roles import role_of
from gossamer.methods.targeted import matches_end

_STACKED = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
"""What the linear modules of single experts were called before transformers 5 stacked them."""


def select(model: nn.Module, spec: TargetedMethod, stored: Adapter | None = None) -> Selection:
    """Resolve a spec's patterns on a model.

    Args:
        stored: the adapter whose spec it is; then modules that it has tensors for are not left out.

    Raises: TargetError for every pattern that names nothing adaptable; UnsupportedError for a module that is named and
        where a layer would not mean what it says.
    """
    return _Selector(model, spec, stored).selection()


class _Selector:
    """A spec's patterns, one by one, on the modules of a model."""

    def __init__(self, model: nn.Module, spec: TargetedMethod, stored: Adapter | None) -> None:
        self.model, self.spec, self.stored = model, spec, stored
        self.modules, self.names = walk.modules_and_names(model)
        self.shapes = {path: shape_of(path, module) for path, module in self.modules.items()}
        self.bypass = bypassed(self.modules)
        self.saved = self._saved()
        free = {path: shape for path, shape in self.shapes.items() if path not in self.saved}
        self.fit = fitness(spec, model, self.modules, free, self.bypass)
        self.held = frozenset(stored.tensors if stored else ())

    def selection(self) -> Selection:
        """All that the spec names, checked."""
        matrices, barred = self._matrices(), self.fit.barred
        targets = self._targets({*matrices})
        held = [path for path in targets if path in barred and path in self.held and self.shapes[path].kind]
        idle = {path: barred[path] for path in held}
        if self.stored is not None:  # what the file leaves out is left out
            targets = [path for path in targets if path not in barred or path in self.held]
        refuse_barred([path for path in targets if path not in idle], self.fit, self.modules)
        notes = self._notes(targets)
        if not targets:
            raise TargetError(
                "no module is left to adapt",
                got=f"target_modules={self.spec.target_modules!r}, exclude_modules={self.spec.exclude_modules!r}",
                expected=_choices(self.fit.able)
                if self.fit.able
                else f"{self.spec.name} stands at {self.spec.stands_at}",
                hint="; ".join(notes),
            )
        self._check_patterns(targets)
        self._refuse_bypassed([*targets, *self.saved])
        tokens = self._tokens()
        for path in tokens:
            if path in targets or path in self.saved:
                raise TargetError(
                    "trainable_tokens names a module that is adapted or trained whole already", where=path
                )
        whole = {*targets, *self.saved}
        with_bias = [
            path for path, one in self.modules.items() if isinstance(one._parameters.get("bias"), nn.Parameter)
        ]
        owning = [path for path in with_bias if path not in whole]
        biased = self.spec.bias_modules(targets, owning)
        self._refuse_bypassed(biased)
        everything = (*targets, *self.saved, *biased, *tokens)
        for path in {*matrices}.intersection(targets):
            self.shapes[path] = shape_of(path, self.modules[path], matrices[path])
        return Selection(
            tuple(targets),
            tuple(self.saved),
            tuple(biased),
            tokens,
            {path: self.modules[path] for path in everything},
            {path: self.shapes[path] for path in everything} | with_ties([self.shapes[path] for path in targets]),
            {path: len(self.names[path]) for path in everything if len(self.names[path]) > 1},
            self.bypass,
            idle,
            notes,
        )

    def _ending(self, suffix: str, candidates: Iterable[str]) -> list[str]:
        """Candidates of which any name is the suffix, or ends with it after a dot."""
        return [path for path in candidates if any(_ends_with(name, suffix) for name in self.names[path])]

    # Targets ---------------------------------------------------------------------------------------------------

    def _targets(self, with_matrices: set[str]) -> list[str]:
        """Where the method's layers stand, in the model's order, without what other fields of the spec leave out."""
        chosen = with_matrices.union(self._named())
        return self._in_layers(self._not_excluded([path for path in self.shapes if path in chosen]))

    def _named(self) -> Iterable[str]:
        """The modules that `target_modules` means."""
        pattern, fit = self.spec.target_modules, self.fit
        if pattern in MEANT_FOR_ALL:
            return self._meant_for_all()
        if isinstance(pattern, str):
            found = [path for path in fit.nameable if any(re.fullmatch(pattern, name) for name in self.names[path])]
            if not found:
                what = "the target expression matches no adaptable module"
                raise TargetError(what, got=pattern, expected=_choices(fit.able))
            return found
        chosen: set[str] = set()
        for entry in pattern:
            found = self._ending(entry, fit.nameable)
            if not found and not self._stacked_by(entry):
                raise self._unmatched("target_modules", entry, self._ending(entry, self.modules), fit.able)
            chosen.update(found)
        return chosen

    def _meant_for_all(self) -> list[str]:
        """What "auto" and "all-linear" mean."""
        by_itself = [path for path in self.fit.able if path in self.held or path not in self.fit.aside]
        known = [*by_itself, *(path for path in self.fit.barred if path in self.held)]
        known = [path for path in known if not self._attention_around(path)]
        if self.spec.target_modules == "auto":
            return [path for path in known if not self.spec.roles or role_of(path) in self.spec.roles]
        left, kinds = heads(self.model, self.modules), (*LINEAR_KINDS, "attention")
        return [path for path in known if self.shapes[path].kind in kinds and path not in left]

    def _notes(self, targets: list[str]) -> tuple[str, ...]:
        """What a pattern that means all modules left out, of those that it means."""
        if self.spec.target_modules not in MEANT_FOR_ALL:
            return ()
        why = {**self.fit.barred, **self.fit.aside}
        gone = [path for path in self.fit.nameable if path in why and path not in targets]
        if self.spec.target_modules == "all-linear":
            kinds, ends = (*LINEAR_KINDS, "attention"), heads(self.model, self.modules)
            gone = [path for path in gone if looks_like(self.modules[path]) in kinds and path not in ends]
        return left_out(gone, why, self.spec)

    def _stacked_by(self, entry: str) -> list[str]:
        """The experts whose stacked matrices took the place of the linear modules that `entry` used to name."""
        stacked = [path for path, shape in self.shapes.items() if shape.kind == "experts"]
        return [path for path in stacked if _STACKED.get(entry) in self.shapes[path].matrices]

    def _matrices(self) -> dict[str, tuple[str, ...]]:
        """Path of experts or attention -> those of their matrices that are named one by one."""
        known = [(path, matrix) for path, shape in self.shapes.items() for matrix in shape.matrices]
        chosen: dict[str, set[str]] = {}
        for entry in getattr(self.spec, "target_parameters", ()):
            found = [
                (path, matrix)
                for path, matrix in known
                if any(_ends_with(f"{name}.{matrix}", entry) for name in self.names[path])
            ]
            if not found:
                paths = [f"{path}.{matrix}" for path, matrix in known]
                raise TargetError(
                    f"target_parameters: {entry!r} matches no stacked matrix",
                    expected=_choices(paths) if paths else "a model with stacked experts",
                    hint=_hint(entry, paths) or "a module's own weight is adapted by target_modules",
                )
            for path, matrix in found:
                chosen.setdefault(path, set()).add(matrix)
        pattern = self.spec.target_modules
        for entry in pattern if isinstance(pattern, tuple) else ():
            if not any(_ends_with(path, entry) for path in self.shapes):
                for path in self._stacked_by(entry):
                    chosen.setdefault(path, set()).add(_STACKED[entry])
        return {path: tuple(sorted(matrices)) for path, matrices in chosen.items()}

    def _not_excluded(self, targets: list[str]) -> list[str]:
        """Targets without those that `exclude_modules` names, themselves or by a module they are in.

        A stored adapter's tensors inside a module that is excluded stay: other tools mean the named modules alone.
        """
        pattern = self.spec.exclude_modules
        matches = re.fullmatch if isinstance(pattern, str) else lambda entry, way: _ends_with(way, entry)
        gone: set[str] = set()
        for entry in [pattern] if isinstance(pattern, str) else pattern:

            def named(path: str, inside: bool, entry: str = entry) -> bool:
                ways = (way for name in self.names[path] for way in (_parents(name) if inside else (name,)))
                return any(matches(entry, way) for way in ways)

            found = [path for path in targets if named(path, path not in self.held)]
            if not found and not any(named(path, True) for path in (*targets, *self.fit.aside, *self.fit.barred)):
                if isinstance(pattern, str):
                    raise TargetError("exclude_modules excludes nothing", got=pattern, expected=_choices(targets))
                raise self._unmatched("exclude_modules", entry, [], targets)
            gone.update(found)
        return [path for path in targets if path not in gone]

    def _in_layers(self, targets: list[str]) -> list[str]:
        wanted = self.spec.layers_to_transform
        if wanted is None:
            return targets
        wanted = (wanted,) if isinstance(wanted, int) else wanted
        layer_of = {path: next((int(part) for part in path.split(".") if part.isdigit()), None) for path in targets}
        present = sorted({index for index in layer_of.values() if index is not None})
        missing = [index for index in wanted if index not in present]
        if missing:
            span = f"{present[0]}..{present[-1]}" if present else "no numbered layers"
            what = "layers_to_transform names layers that this model does not have"
            raise TargetError(what, got=str(missing), expected=span)
        return [path for path in targets if layer_of[path] in wanted]

    def _check_patterns(self, targets: list[str]) -> None:
        places = [*targets, *(f"{path}.{name}" for path in targets for name in self.shapes[path].matrices)]
        for kind in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.spec, kind, {}):
                if not any(matches_end(pattern, path) for path in places):
                    what = f"{kind} has an entry that matches no adapted module"
                    raise TargetError(what, got=pattern, hint=_hint(pattern, places))

    # What is trained whole -------------------------------------------------------------------------------------

    def _saved(self) -> list[str]:
        """Every module with parameters of its own at or below a module that `modules_to_save` names."""
        chosen: set[str] = set()
        for entry in self.spec.modules_to_save:
            roots = self._ending(entry, self.modules)
            inside = [
                path for path in self.modules if any(path == root or path.startswith(f"{root}.") for root in roots)
            ]
            owners = [path for path in inside if any(True for _ in self.modules[path].parameters(recurse=False))]
            if not owners:
                raise self._unmatched("modules_to_save", entry, roots, [path for path in self.modules if path])
            chosen.update(owners)
        whole = [path for path in self.modules if path in chosen]
        return [path for path in whole if self._attention_around(path) not in chosen]  # it trains its parts itself

    def _tokens(self) -> dict[str, tuple[int, ...]]:
        """Embedding -> rows of it to train whole, checked."""
        wanted = self.spec.trainable_tokens
        if isinstance(wanted, tuple):
            getter = getattr(self.model, "get_input_embeddings", None)
            embedding = getter() if getter and wanted else None
            if wanted and embedding is None:
                raise TargetError(
                    "trainable_tokens without a name means the input embedding, which this model does not tell",
                    hint='name it: {"embed_tokens": [...]}',
                )
            wanted = {path: wanted for path in self.shapes if wanted and self.modules[path] is embedding}
        found: dict[str, tuple[int, ...]] = {}
        for entry, rows in wanted.items():
            for path in self._embeddings(entry):
                count = self.shapes[path].in_features
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

    def _embeddings(self, entry: str) -> list[str]:
        """The embeddings that an entry of `trainable_tokens` names."""
        known = [path for path, shape in self.shapes.items() if shape.kind == "embedding"]
        found = [entry] if entry in known else self._ending(entry, known)
        if found:
            return found
        for path in self._ending(entry, self.modules):
            if looks_like(self.modules[path]) == "embedding":
                why = why_not(self.modules[path], "embedding")
                raise UnsupportedError("rows of it cannot be trained: " + why, where=path)
        what = f"trainable_tokens: {entry!r} is no embedding"
        raise TargetError(what, expected=_choices(known), hint=_hint(entry, known))

    # Refusals --------------------------------------------------------------------------------------------------

    def _attention_around(self, path: str) -> str | None:
        """The torch attention that uses this module's weight without calling it."""
        owner = path.rpartition(".")[0]
        return owner if isinstance(self.modules.get(owner), nn.MultiheadAttention) else None

    def _refuse_bypassed(self, chosen: list[str]) -> None:
        for path in chosen:
            if isinstance(self.modules[path], nn.RNNBase):
                raise UnsupportedError(
                    "torch's recurrent modules run on a flat copy of their weights, so nothing can stand in for those",
                    where=path,
                    got=type(self.modules[path]).__name__,
                )
            owner = self._attention_around(path)
            if owner is not None:
                raise UnsupportedError(
                    "MultiheadAttention uses this module's weight without calling it",
                    where=path,
                    hint=f"adapt the attention itself: {owner or 'the model'}",
                )

    def _unmatched(self, field: str, entry: str, present: list[str], adaptable: Iterable[str]) -> TargetError:
        """The error of an entry that names nothing adaptable, though perhaps the modules that are `present`."""
        if not present:
            what = f"{field}: {entry!r} matches no module"
            return TargetError(what, expected=_choices(adaptable), hint=_hint(entry, adaptable))
        inside = [path for path in adaptable if any(path.startswith(root + ".") for root in present)]
        return TargetError(
            f"{field}: {entry!r} names a {type(self.modules[present[0]]).__name__}, which cannot be adapted",
            where=present[0],
            hint=f"the adaptable modules inside it: {', '.join(_suffixes(inside))}"
            if inside
            else "modules_to_save can train it whole",
        )


def _ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def _parents(name: str) -> list[str]:
    """A path and those of the modules that hold it: "a.b.c", "a", "a.b"."""
    return [name, *(name[:end] for end, letter in enumerate(name) if letter == ".")]


def _suffixes(paths: Iterable[str]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def _choices(paths: Iterable[str]) -> str:
    return "one of " + ", ".join(_suffixes(paths))


def _hint(pattern: str, paths: Iterable[str]) -> str:
    paths = [*paths]
    return nearest(pattern.rsplit(".", 1)[-1], _suffixes(paths)) or nearest(pattern, paths)
