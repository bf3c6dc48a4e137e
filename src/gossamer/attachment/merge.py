"""merge and unmerge: fold adapters into the weights, and give the weights back bit for bit.

    W' = W + sum_i scaling_i B_i A_i      computed in float32, rounded once to W's dtype

A weight that is stored in 4 or 8 bits is rebuilt, and while merged the dense sum stands in its place: codes hold no
such sum. Unmerging gives the codes back.

While merged the model has no trace of Gossamer in its calls, so the latency is the base's own. What the weights were
is kept beside (one copy of the changed matrices), because subtracting the delta again would not restore them:
in bfloat16, ten cycles of add and subtract move weights by 5e-3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gossamer.attachment import walk
from gossamer.attachment.host import Host, require_host
from gossamer.attachment.site import Active, Site
from gossamer.errors import NonFiniteError, SharedWeightError, StateError, UnsupportedError


@torch.no_grad()
def merge(model: nn.Module, *names: str, keep: bool = True) -> None:
    """Fold adapters (all active ones when none is named) into the weights they stand at. All or nothing.

    Args:
        keep: hold the original matrices in memory so that `unmerge` can restore them. False folds for good: the
            merged adapters are gone, and without others the model is a plain one again.

    Raises:
        SharedWeightError: a weight that also serves a module the adapter does not stand at (tied embeddings).
        NonFiniteError: a merged weight would hold NaN or infinity. StateError: already merged, or unknown names.
        UnsupportedError: a method without an equivalent weight, or weights that are sharded.
        Nothing is changed in any of these cases.
    """
    host = require_host(model)
    host.refuse_while_merged("merge")
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise UnsupportedError(
            "the weights are spread over several processes", hint="save the adapter, and merge it into a whole base"
        )
    chosen = _chosen(host, names)
    changes = _changes(host, chosen)
    originals = {
        path: {name: _copied(host.sites[path].stored(name)) for name in parameters}
        for path, parameters in changes.items()
        if keep
    }  # all of them before any is written: two may be one tensor
    for path, parameters in changes.items():
        for name, value in parameters.items():
            host.sites[path].store(name, value)
    if not keep:
        for path in changes:
            host.sites[path].forget_codes()
        host.remove(*chosen)
        return
    for site in host.sites.values():
        site.disable()
    host.stash, host.merged = originals, chosen


def _copied(stored: Tensor | None) -> Tensor | None:
    return None if stored is None else stored.detach().clone()


def _chosen(host: Host, names: tuple[str, ...]) -> Active:
    running = host.active
    if not names and not isinstance(running, tuple):
        raise StateError("rows use different adapters, so there is no one merge", hint="name the adapters to merge")
    chosen = names or running
    host.check_together(chosen)  # pyright: ignore[reportArgumentType]
    if not chosen:
        raise StateError("no adapter is active, so there is nothing to merge", hint="name the adapters to merge")
    return chosen  # pyright: ignore[reportReturnType]


def _changes(host: Host, names: Active) -> dict[str, dict[str, Tensor]]:
    """Every new parameter value, checked, before any is written."""
    changes: dict[str, dict[str, Tensor]] = {}
    for path, site in host.sites.items():
        merged = site.merged(names)
        for name, value in merged.items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    "the merged weight would not be finite; nothing was merged", where=f"{path}.{name}"
                )
        _refuse_clipped(site, merged)
        if merged:
            changes[path] = merged
    _refuse_shared(host, changes)
    return changes


def _refuse_shared(host: Host, changes: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A weight that is stored once is merged only if every module that uses it gets the same new value."""
    owners = walk.owners_of_storage(host.model)
    values = {f"{path}.{name}": value for path, merged in changes.items() for name, value in merged.items()}
    for path, merged in changes.items():
        for name, value in merged.items():
            stored = host.sites[path].stored(name)
            shared = owners[stored.untyped_storage().data_ptr()] if stored is not None else []
            others = [values.get(other) for other in shared] if len(shared) > 1 else []
            if any(other is None or not torch.equal(other, value) for other in others):
                raise SharedWeightError(
                    "this weight is stored once and used by several modules, so merging here would change them all",
                    where=f"{path}.{name}",
                    got=f"shared by {', '.join(shared)}",
                    hint="keep the adapter unmerged, leave the module out, or untie the model first",
                )


def _refuse_clipped(site: Site, merged: Mapping[str, Tensor]) -> None:
    """An embedding with max_norm shrinks long rows when they are looked up: the merged ones, but not W's own."""
    limit = getattr(site.module, "max_norm", None)
    if limit is not None and "weight" in merged:
        longest = merged["weight"].float().norm(p=getattr(site.module, "norm_type", 2.0), dim=1).max().item()
        if longest > limit:
            raise UnsupportedError(
                "the embedding's max_norm would shrink merged rows, so merged and unmerged would differ",
                where=site.path,
                got=f"a row of norm {longest:.4g}",
                expected=f"at most {limit:.4g}",
            )


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Give every merged weight its original bits back; the adapters stand beside them again. Raises `StateError`."""
    host = require_host(model)
    if host.stash is None:
        raise StateError("nothing is merged")
    for path, parameters in host.stash.items():
        for name, original in parameters.items():
            host.sites[path].store(name, original)
    for site in host.sites.values():
        site.enable()
    host.stash, host.merged = None, ()
