"""merge and unmerge: fold adapters into the weights, and give the weights back bit for bit.

    W' = W + sum_i scaling_i B_i A_i      computed in float32, rounded once to W's dtype

A weight that is stored in 4 or 8 bits is rebuilt, and while merged the dense sum stands in its place: codes hold no
such sum. Unmerging gives the codes back.

While merged the model has no trace of Gossamer in its calls, so the latency is the base's own. What the weights were
is kept beside (one copy of the changed matrices), because subtracting the delta again would not restore them:
in bfloat16, ten cycles of add and subtract move weights by 5e-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.attachment import walk
from gossamer.attachment.frozen import parameters_of
from gossamer.attachment.host import Host, require_host
from gossamer.attachment.site import Active, Site
from gossamer.errors import NonFiniteError, SharedWeightError, StateError, UnsupportedError

NewValue = tuple[str, str, Tensor]
"""Path of a module, name of its parameter, the parameter's new value."""


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
    changes = [change for group in _groups(host, chosen) for change in group.changes()]  # all, before any is written
    if not keep:
        for path, name, value in changes:
            host.sites[path].store(name, value)
        for path, _, _ in changes:
            host.sites[path].forget_codes()
        host.remove(*chosen)
        return
    host.stash = [(path, name, host.sites[path].exchange(name, value)) for path, name, value in changes]
    host.merged = chosen
    for site in host.sites.values():
        site.disable()


def merge_groups(model: nn.Module, *names: str, dtype: torch.dtype | None = None) -> list[Group]:
    """What `merge` would write, to be computed a group at a time; nothing is changed.

    Args:
        dtype: what the float32 sums are rounded to; None for each parameter's own.

    Raises: StateError: already merged, or unknown names.
    """
    host = require_host(model)
    host.refuse_while_merged("merge")
    return _groups(host, _chosen(host, names), dtype)


def _chosen(host: Host, names: tuple[str, ...]) -> Active:
    if not names and host.active.unit != "batch":
        raise StateError("rows use different adapters, so there is no one merge", hint="name the adapters to merge")
    chosen = names or host.active.mixes[0]
    host.check_together(chosen)
    if not chosen:
        raise StateError("no adapter is active, so there is nothing to merge", hint="name the adapters to merge")
    return chosen


@dataclass(frozen=True)
class Group:
    """Modules that must be merged together, because they use one stored weight; nearly always it is one module."""

    host: Host
    sites: tuple[Site, ...]
    names: Active
    dtype: torch.dtype | None
    owners: Mapping[int, list[str]]

    def parameters(self) -> list[str]:
        """Canonical names of the parameters that may change."""
        pairs = [(site.path, name) for site in self.sites for name in parameters_of(site.module)]
        return [f"{path}.{name}" if path else name for path, name in pairs]

    def row_wise(self) -> str | None:
        """The canonical name of a weight that is all that changes, and that `rows` gives; None where there is none."""
        (site, *others) = self.sites
        weight = site.stored("weight") if site.shape.kind == "linear" else None
        if others or weight is None or len(self.owners.get(weight.untyped_storage().data_ptr(), [])) > 1:
            return None
        return None if self._rows(site, weight.detach(), slice(0)) is None else f"{site.path}.weight".lstrip(".")

    @torch.no_grad()
    def rows(self, nbytes: int = 1 << 23) -> Iterator[Tensor]:
        """The new weight of `row_wise`, checked, in blocks of rows of so many bytes: nothing large is allocated.

        Raises `NonFiniteError`.
        """
        (site,) = self.sites
        weight = site.frozen.value("weight").detach()
        step = max(1, nbytes // (4 * weight.shape[1] or 1))
        for start in range(0, len(weight), step):
            block = self._rows(site, weight, slice(start, start + step))
            assert block is not None, site.path
            yield _finite(block, f"{site.path}.weight")

    def _rows(self, site: Site, weight: Tensor, rows: slice) -> Tensor | None:
        block: Tensor | None = weight[rows].to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for layer in site.standing(self.names):
            block = None if block is None else layer.merged_rows(block, rows)
        return block

    @torch.no_grad()
    def changes(self) -> list[NewValue]:
        """Every new parameter value, checked. Raises what `merge` raises."""
        found: list[NewValue] = []
        for site in self.sites:
            merged = site.merged(self.names, self.dtype)
            for name, value in merged.items():
                found.append((site.path, name, _finite(value, f"{site.path}.{name}")))
            _refuse_clipped(site, merged)
        _refuse_shared(self.host, found, self.owners)
        return found


def _finite(value: Tensor, where: str) -> Tensor:
    # NaN and infinity survive a sum, which is the cheapest look at all; one that only overflows is looked at again
    if not math.isfinite(value.sum().item()) and not torch.isfinite(value).all():
        raise NonFiniteError("the merged weight would not be finite; nothing was merged", where=where)
    return value


def _groups(host: Host, names: Active, dtype: torch.dtype | None = None) -> list[Group]:
    owners = walk.owners_of_storage(host.model)
    alone: list[list[Site]] = []
    tied: list[tuple[set[str], list[Site]]] = []
    for site in host.sites.values():
        stored = [one for name in parameters_of(site.module) if (one := site.stored(name)) is not None]
        storages = [owners.get(one.untyped_storage().data_ptr(), []) for one in stored]
        keys, sites = {sharing[0] for sharing in storages if len(sharing) > 1}, [site]
        if not keys:
            alone.append(sites)
            continue
        for others in [one for one in tied if keys & one[0]]:
            tied.remove(others)
            keys, sites = keys | others[0], others[1] + sites
        tied.append((keys, sites))
    return [Group(host, tuple(sites), names, dtype, owners) for sites in [*alone, *(sites for _, sites in tied)]]


def _refuse_shared(host: Host, changes: Sequence[NewValue], owners: Mapping[int, list[str]]) -> None:
    """A weight that is stored once is merged only if every module that uses it gets the same new value."""
    values = {f"{path}.{name}": value for path, name, value in changes}
    for path, name, value in changes:
        stored = host.sites[path].stored(name)
        shared = owners.get(stored.untyped_storage().data_ptr(), []) if stored is not None else []
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
    for path, name, original in reversed(host.stash):  # two may have been one tensor
        host.sites[path].store(name, original)
    for site in host.sites.values():
        site.enable()
    host.stash, host.merged = None, ()
