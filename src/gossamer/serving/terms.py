"""Adapters for a decoder whose rows have one each: made ready for its sites, and laid out for the parts of a step."""

from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment.frozen import Frozen
from gossamer.attachment.kinds import shape_of
from gossamer.attachment.layers import stored_layers
from gossamer.errors import NonFiniteError, UnsupportedError
from gossamer.kernels.routed import Routed
from gossamer.kernels.routing import LinearChange, Mix, Routing, Stack
from gossamer.kernels.slots import Slotted
from gossamer.methods import TargetedMethod
from gossamer.running.steps import ChunkRows, Decoder
from gossamer.serving.store import LoadedAdapter, Placed

LoadedMix = tuple[tuple[LoadedAdapter, float], ...]
"""What one sequence has: adapters, each with its weight. Empty for the base alone."""

Laid = dict[int, Routed]
"""Number of a site -> its adapters, laid out for the rows of a part."""


class DecoderTarget:
    """Makes stacks of adapters, for the sites of a decoder of a model."""

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        self.model, self.decoder = model, decoder
        sites = enumerate(decoder.sites)
        self.places = {path: (site, place) for site, one in sites for place, path in enumerate(one.paths)}

    def place(self, name: str, number: int, adapter: Adapter) -> Placed:
        """What the adapter makes of the maps at each site.

        Raises: UnsupportedError for what rows cannot each have their own of; NonFiniteError.
        """
        stacks = {site: self._stack(site, shares) for site, shares in self._shares(name, adapter).items()}
        ranks = [pair.rank for stack in stacks.values() for pair in stack.pairs]
        is_sum = not any(stack.rest for stack in stacks.values())
        return Placed(stacks, is_sum, max(ranks, default=0), sum(stack.nbytes for stack in stacks.values()))

    def remove(self, number: int) -> None:
        """Nothing stands anywhere: the tensors go with the value."""

    def _shares(self, name: str, adapter: Adapter) -> dict[int, dict[int, LinearChange]]:
        """Site -> place among its maps -> the adapter's share."""
        if not isinstance(adapter.spec, TargetedMethod):
            raise UnsupportedError("no row of a batch can have its own", where=name, got=adapter.spec.name)
        _, layers = stored_layers(self.model, adapter)
        found: dict[int, dict[int, LinearChange]] = {}
        for path, (shape, layer) in layers.items():
            site, place = self.places.get(path, (-1, 0))
            group = self.decoder.sites[site]
            share = layer.linear_change(Frozen(shape, group.modules[place])) if site >= 0 else None
            if share is None or (share.given is not None and len(group.paths) > 1):
                raise UnsupportedError(
                    "an adapter has something that rows of a batch cannot each have their own of",
                    where=f"{name}: {path}",
                    got=f"{adapter.spec.name} at {shape.class_name}",
                    hint="merge it, or serve it as the base",
                )
            if not all(bool(part.isfinite().all()) for part in share.tensors()):
                raise NonFiniteError("an adapter holds NaN or infinity", where=f"{name}: {path}")
            found.setdefault(site, {})[place] = share
        return found

    def _stack(self, site: int, shares: Mapping[int, LinearChange]) -> Stack:
        maps = [
            Frozen(shape_of(path, module), module).shape for path, module in zip(*self.decoder.sites[site], strict=True)
        ]
        like = self.decoder.like.new_zeros(0, maps[0].in_features)
        return Stack.of([shares.get(place) for place in range(len(maps))], [one.out_features for one in maps], like)


class BatchTerms:
    """Who has which adapters in the step that is being taken."""

    def __init__(self) -> None:
        self.known: list[tuple[Routing[Mix], Laid]] = []

    def look(self, mixes: Sequence[LoadedMix], parts: Sequence[ChunkRows]) -> bool:
        """Lay out the mixes of a step's chunks for its parts; False if none has an adapter."""
        before, self.known = self.known, []
        for number, part in enumerate(parts):
            rows = [(mixes[piece], count) for piece, count in part]
            adapters = {loaded.number: loaded for mix, _ in rows for loaded, _ in mix}
            routing = Routing(
                tuple(tuple((loaded.number, weight) for loaded, weight in mix) for mix, _ in rows),
                tuple(count for _, count in rows),
            )
            known, laid = before[number] if number < len(before) else (None, {})
            self.known.append((routing, laid if known == routing else _laid(adapters, routing, laid)))
        return any(mixes)

    def fixed(self) -> Hashable | None:
        """Where the slots are that this step's rows look up; None if adapters are laid out for this step alone."""
        filled = [(part, each) for part, (routing, each) in enumerate(self.known) if routing.rows]
        laid = {(part, site): one for part, each in filled for site, one in each.items()}
        if any(one.rest is not None or one.way not in ("slotted", "none") for one in laid.values()):
            return None
        return frozenset((*place, one.slots) for place, one in laid.items() if one.slots is not None)

    def at(self, part: int, site: int) -> bool:
        """Whether an adapter of the part is at the site."""
        return site in self.known[part][1]

    def before(self, part: int, site: int, x: Tensor) -> Tensor:
        """The input as the maps of the site should read it."""
        routed = self.known[part][1].get(site)
        return x if routed is None else routed.before(x)

    def after(self, part: int, site: int, x: Tensor, outs: Sequence[Tensor], whole: Tensor | None = None) -> None:
        """Change the maps' outputs, in place."""
        routed = self.known[part][1].get(site)
        if routed is not None:
            routed.after(x, outs, whole)


def _laid(adapters: Mapping[int, LoadedAdapter], routing: Routing[Mix], before: Laid) -> Laid:
    laid: Laid = {}
    lasting = {site for site, one in before.items() if isinstance(one.slots, Slotted)}
    for site in lasting.union(*(one.placed.stacks for one in adapters.values())):
        stacks = {number: one.placed.stacks[site] for number, one in adapters.items() if site in one.placed.stacks}
        here = routing
        if len(stacks) < len(adapters):
            kept = tuple(tuple(entry for entry in mix if entry[0] in stacks) for mix in routing.mixes)
            here = Routing(kept, routing.lengths)
        laid[site] = Routed(stacks, here, before=before.get(site))
    return laid
