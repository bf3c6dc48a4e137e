"""attach, use, capture, detach: how an adapter meets a model and leaves it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import walk
from gossamer.attachment.host import Attached, Host, find_host, make_host, require_host
from gossamer.attachment.layers import MadeLayers, new_layers, stored_layers
from gossamer.attachment.match import select
from gossamer.attachment.merge import unmerge
from gossamer.attachment.remarks import described, idle_note, warn_of_other_base
from gossamer.attachment.report import InjectionReport, SiteRow
from gossamer.attachment.saving import Saving
from gossamer.attachment.site import BASE_ALONE, Active
from gossamer.errors import BaseMismatchError, StateError, UnsupportedError, UsageError
from gossamer.kernels.routing import Routing
from gossamer.methods import Shape, TargetedMethod


def attach(
    model: nn.Module,
    what: TargetedMethod | Adapter,
    name: str = "default",
    *,
    trainable: bool | None = None,
    seed: int = 0,
    force_base: bool = False,
) -> InjectionReport:
    """Stand an adapter at the modules its spec names, freeze the base, and make the adapter the active one.

    The model keeps its class, its module names and its state-dict keys. A new adapter leaves the output unchanged.

    Args:
        model: any torch module; what `all-linear` and the head mean is known for transformers models.
        what: a spec (a new adapter) or an Adapter value (a stored one).
        name: letters, digits, "_" and "-"; how `use`, `capture` and the others call it.
        trainable: whether its parameters receive gradients; by default a new one's do and a stored one's do not.
        seed: of the random factors; each module draws from (seed, path), whatever else is attached.
        force_base: attach although the adapter's base fingerprint says that it was made for another base.

    Raises:
        TargetError: a pattern that names nothing, with the nearest names. StateError: a name taken, or merged weights.
        UnsupportedError: a module is named whose forward is not its kind's map, or whose weight is used without a call.
        BaseMismatchError, AdapterFileError: a stored adapter that does not belong here. Nothing is changed then.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise UsageError("not a usable adapter name", got=repr(name), expected="1 to 64 letters, digits, '_' or '-'")
    existing = find_host(model)
    if existing:
        existing.refuse_while_merged("attach")
        if name in existing.adapters:
            raise StateError(
                f"an adapter named {name!r} is already attached", hint="detach it first, or choose another name"
            )
    here = existing.fingerprint if existing else None
    if isinstance(what, Adapter):
        here = here or walk.base_fingerprint(model)
        _check_base(here, what, force_base)
        warn_of_other_base(model, what)
        selection, layers = stored_layers(model, what)
        spec: Any = what.spec
        if trainable and selection.idle:
            path, why = next(iter(selection.idle.items()))
            raise UnsupportedError(f"a layer here cannot be trained: {why}", where=path)
        attached = Attached(spec, selection, bool(trainable), what.provenance, what.foreign)
    else:
        selection = select(model, what)
        layers = new_layers(model, what, selection, seed)
        attached = Attached(what, selection, trainable is not False)
    host = make_host(model, here)
    Saving(host, capture).stand_in()
    host.add(name, attached, layers)
    host.active = Routing.everywhere((name,))
    report = _report(host, name, attached, layers)
    return replace(report, notes=(*report.notes, *idle_note(what))) if isinstance(what, Adapter) else report


def _check_base(here: dict[str, str], adapter: Adapter, force: bool) -> None:
    if adapter.base is None or force:
        return
    differing = walk.differing(adapter.base, here)
    if differing:
        raise BaseMismatchError(
            f"this adapter was made for another base model ({', '.join(differing)} differ)",
            got=f"{here['architecture']} weights {here['weights'][:12]}",
            expected=f"{adapter.base.get('architecture')} weights {str(adapter.base.get('weights'))[:12]}",
            hint="force_base=True (--force-base) attaches it all the same",
        )


def _report(host: Host, name: str, attached: Attached, layers: MadeLayers) -> InjectionReport:
    rows, notes = [], [*attached.selection.notes]
    notes += [
        f"note: {path} carries a change of zero, and no other: {why}" for path, why in attached.selection.idle.items()
    ]
    own = {path: [*layer.slots().values()] for path, (_, layer) in layers.items()}
    rank_at = getattr(attached.spec, "rank_at", lambda _: None)
    for path, (shape, _) in layers.items():
        rank = rank_at(path) if path in attached.selection.target_set else None
        count = sum(slot.numel() for slot in own[path])
        rows.append(SiteRow(path, shape.class_name, _size(shape), rank, count))
        if path in attached.selection.aliases:
            known_as = attached.selection.aliases[path]
            notes.append(f"note: {path} is one module under {known_as} names; adapted once")
    every = [slot for slots in own.values() for slot in slots]
    trainable = sum(slot.numel() for slot in every if slot.requires_grad)
    total = sum(slot.numel() for slot in every) + host.size
    nbytes = sum(slot.numel() * slot.element_size() for slot in every)
    return InjectionReport(name, tuple(rows), trainable, total, nbytes, tuple(notes))


def _size(shape: Shape) -> str:
    """A weight as "out x in", kernels after it; of other modules the shapes of their parameters."""
    if shape.out_features:
        kernel = f" x {list(shape.kernel)}" if shape.kernel else ""
        return f"{shape.out_features} x {shape.in_features}{kernel}"
    return str([tuple(parameter.shape) for parameter in shape.parameters.values()])


def attached(model: nn.Module) -> tuple[str, ...]:
    """Names of the attached adapters, in the order they came."""
    host = find_host(model)
    return tuple(host.adapters) if host else ()


def active(model: nn.Module) -> tuple[str, ...] | list[tuple[str, ...]]:
    """The names whose layers run, in stacking order; a list with one tuple a row, or a span, when they differ."""
    host = find_host(model)
    now = host.active if host else BASE_ALONE
    return now.mixes[0] if now.unit == "batch" else [*now.mixes]


def use(model: nn.Module, *names: str | None | Sequence[str | None]) -> None:
    """Choose which adapters run from now on.

    `use(model, "a")` one; `use(model, "a", "b")` both, b around a; `use(model, None)` the base alone;
    `use(model, ["a", None, "b"])` one entry for each row of the next batches. Cost: a few microseconds.

    Raises: StateError for a name that is not attached, or while merged.
    """
    host = require_host(model)
    host.refuse_while_merged("change the active adapters")
    if len(names) == 1 and isinstance(names[0], list | tuple):
        mixes = tuple(_checked(host, (entry,)) for entry in names[0])
        host.active = Routing(mixes, (1,) * len(mixes), "row")
    else:
        host.active = Routing.everywhere(_checked(host, names))


def _checked(host: Host, names: Sequence[Any]) -> Active:
    chosen = tuple(name for name in names if name is not None)
    for name in chosen:
        if not isinstance(name, str):
            raise UsageError(
                "an adapter is called by its name", got=repr(name), expected="a name, None, or one list of them"
            )
    host.check_together(chosen)
    return chosen


@contextmanager
def using(model: nn.Module, *names: str | None | Sequence[str | None]) -> Iterator[None]:
    """`use` for the length of a `with` block; what was active before is active again after it."""
    host = require_host(model)
    with host.running(host.active):
        use(model, *names)
        yield


@contextmanager
def using_spans(model: nn.Module, spans: Sequence[tuple[Sequence[str], int, int]]) -> Iterator[None]:
    """For a packed row: which adapters run for which of its tokens, for the length of a `with` block.

    Args:
        spans: (names, start, stop), one after the other, from the row's first token to its last.

    Raises: StateError for a name that is not attached, spans that leave a gap, or while merged.
    """
    host = require_host(model)
    host.refuse_while_merged("change the active adapters")
    mixes = tuple(_checked(host, names) for names, _, _ in spans)
    ends = (0, *(stop for _, _, stop in spans))
    if not spans or any(start != end or stop <= end for (_, start, stop), end in zip(spans, ends, strict=False)):
        raise StateError("spans follow one another without a gap", got=str([tuple(span) for span in spans]))
    with host.running(Routing(mixes, tuple(stop - start for _, start, stop in spans))):
        yield


def trainable_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """`"<path>.<slot>"` -> parameter of one adapter (prefixed `"<name>:"` and of all trainable ones when None)."""
    host = require_host(model)
    if name is not None:
        host.known(name)
        layers = host.layers_of(name)
        found = {f"{path}.{slot}": value for path in layers for slot, value in layers[path].named_parameters()}
        return {key: found[key] for key in sorted(found) if found[key].requires_grad}
    return {f"{one}:{key}": value for one in host.adapters for key, value in trainable_parameters(model, one).items()}


def sites_of_parameters(model: nn.Module, name: str) -> dict[str, str]:
    """`"<path>.<slot>"` -> path, for the trainable parameters of one adapter: which module each of them stands at."""
    layers = require_host(model).layers_of(name)
    return {f"{path}.{slot}": path for path, layer in layers.items() for slot in layer.slots()}


def neutral_values(model: nn.Module, name: str) -> dict[str, Tensor | None]:
    """`"<path>.<slot>"` -> what weight decay pulls it towards where that is not zero, or None: see `Layer.neutral`."""
    host = require_host(model)
    return {
        f"{path}.{slot}": value
        for path, layer in host.layers_of(name).items()
        for slot, value in layer.neutral(host.sites[path].frozen).items()
    }


def capture(model: nn.Module, name: str = "default") -> Adapter:
    """The adapter as a value: its tensors copied to main memory, bit for bit. Raises `StateError`."""
    host = require_host(model)
    attached = host.known(name)
    tensors: dict[str, dict[str, Tensor]] = {}
    for path, layer in host.layers_of(name).items():
        for place, slots in ((path, layer.slots()), ("", layer.common())):
            new = {slot: value for slot, value in slots.items() if slot not in tensors.get(place, {})}
            if new:
                copies = {slot: value.detach().cpu().clone() for slot, value in new.items()}
                tensors.setdefault(place, {}).update(copies)
    foreign = dict(attached.foreign)
    if not foreign:
        foreign |= described(host.model)
        foreign["fan_in_fan_out"] = any(host.sites[path].shape.kind == "conv1d" for path in attached.selection.targets)
    return Adapter(attached.spec, tensors, host.fingerprint, attached.provenance, foreign)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter (or all) off the model; after the last one the model is as it was found, bit for bit.

    Merged adapters are unmerged first. Raises `StateError` for a name that is not attached.
    """
    host = require_host(model)
    if name is not None:
        host.known(name)
        host.refuse_while_merged("detach one adapter")
    elif host.stash is not None:
        unmerge(model)
    host.remove(*([name] if name is not None else host.adapters))
