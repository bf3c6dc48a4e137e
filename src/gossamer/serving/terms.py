"""The adapters' share of a step, laid out for the parts that a decoder runs; what stays is not laid out again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor

from gossamer.kernels.routed import Routed
from gossamer.kernels.routing import Mix, Routing
from gossamer.kernels.slots import Slotted
from gossamer.running.steps import ChunkRows
from gossamer.serving.store import Loaded

LoadedMix = tuple[tuple[Loaded, float], ...]
"""What one sequence has: adapters, each with its weight. Empty for the base alone."""

Laid = dict[int, Routed]
"""Number of a site -> its adapters, laid out for the rows of a part."""


class BatchTerms:
    """Who has which adapters in the step that is being taken."""

    def __init__(self) -> None:
        self.known: list[tuple[Routing[Mix], Laid]] = []

    def look(self, mixes: Sequence[LoadedMix], parts: Sequence[ChunkRows]) -> bool:
        """Lay out the mixes of a step's pieces for its parts; False if nobody has an adapter."""
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
        laid = [(part, site, one) for part, (routing, each) in enumerate(self.known) if routing.rows
                for site, one in each.items()]  # fmt: skip
        if any(one.rest is not None or one.way not in ("slotted", "none") for _, _, one in laid):
            return None
        return frozenset((part, site, one.slots) for part, site, one in laid if one.slots is not None)

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


def _laid(adapters: Mapping[int, Loaded], routing: Routing[Mix], before: Laid) -> Laid:
    laid: Laid = {}
    lasting = {site for site, one in before.items() if isinstance(one.slots, Slotted)}
    for site in lasting.union(*(one.stacks for one in adapters.values())):
        stacks = {number: one.stacks[site] for number, one in adapters.items() if site in one.stacks}
        here = routing
        if len(stacks) < len(adapters):
            kept = tuple(tuple(entry for entry in mix if entry[0] in stacks) for mix in routing.mixes)
            here = Routing(kept, routing.lengths)
        laid[site] = Routed(stacks, here, before=before.get(site))
    return laid
