"""merge and unmerge: fold adapters into the weights, and give the weights back bit for bit.

    W' = W + sum_i scaling_i B_i A_i      computed in float32, rounded once to W's dtype

While merged the model has no trace of Gossamer in its calls, so the latency is the base's own. What the weights were
is kept beside (one copy of the changed matrices), because subtracting the delta again would not restore them:
in bfloat16, ten cycles of add and subtract move weights by 5e-3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.attachment import walk
from gossamer.attachment.host import Host, require_host
from gossamer.attachment.site import Active
from gossamer.errors import NonFiniteError, SharedWeightError, StateError


@torch.no_grad()
def merge(model: nn.Module, *names: str, keep: bool = True) -> None:
    """Fold adapters (all active ones when none is named) into the weights they stand at. All or nothing.

    Args:
        keep: hold the original matrices in memory so that `unmerge` can restore them. False folds for good: the
            merged adapters are gone, and without others the model is a plain one again.

    Raises:
        SharedWeightError: a weight that also serves a module the adapter does not stand at (tied embeddings).
        NonFiniteError: a merged weight would hold NaN or infinity. StateError: already merged, or unknown names.
        Nothing is changed in any of these cases.
    """
    host = require_host(model)
    host.refuse_while_merged("merge")
    chosen = _chosen(host, names)
    changes = _changes(host, chosen)
    host.stash = {path: {} for path in changes}
    for path, parameters in changes.items():
        own = host.sites[path].module._parameters
        for name, value in parameters.items():
            stored = own[name]
            assert stored is not None
            if keep:
                host.stash[path][name] = stored.detach().clone()
            stored.detach().copy_(value)
    if not keep:
        host.stash = None
        host.remove(*chosen)
        return
    for site in host.sites.values():
        site.disable()
    host.merged = chosen


def _chosen(host: Host, names: tuple[str, ...]) -> Active:
    if not names and isinstance(host.active, list):
        raise StateError("rows use different adapters, so there is no one merge", hint="name the adapters to merge")
    chosen = names or tuple(host.active)
    host.check_together(chosen)  # pyright: ignore[reportArgumentType]
    if not chosen:
        raise StateError("no adapter is active, so there is nothing to merge", hint="name the adapters to merge")
    return chosen  # pyright: ignore[reportReturnType]


def _changes(host: Host, names: Active) -> dict[str, dict[str, Tensor]]:
    """Every new parameter value, checked, before any is written."""
    owners = walk.owners_of_storage(host.model)
    changes: dict[str, dict[str, Tensor]] = {}
    for path, site in host.sites.items():
        merged = site.merged(names)
        for name, value in merged.items():
            shared = owners[getattr(site.module, name).untyped_storage().data_ptr()]
            if len(shared) > 1:
                raise SharedWeightError(
                    "this weight is stored once and used by several modules, so merging here would change them all",
                    where=f"{path}.{name}",
                    got=f"shared by {', '.join(shared)}",
                    hint="keep the adapter unmerged, leave the module out, or untie the model first",
                )
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    "the merged weight would not be finite; nothing was merged", where=f"{path}.{name}"
                )
        if merged:
            changes[path] = merged
    return changes


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Give every merged weight its original bits back; the adapters stand beside them again. Raises `StateError`."""
    host = require_host(model)
    if host.stash is None:
        raise StateError("nothing is merged")
    for path, parameters in host.stash.items():
        for name, original in parameters.items():
            stored = host.sites[path].module._parameters[name]
            assert stored is not None
            stored.detach().copy_(original)
    for site in host.sites.values():
        site.enable()
    host.stash, host.merged = None, ()
