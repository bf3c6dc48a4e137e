"""The adapters' share of a step, laid out for the parts that a decoder runs; what stays is not laid out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gossamer.kernels.routed import Routed
from gossamer.kernels.routing import Routing
from gossamer.models.steps import Part
from gossamer.serving.store import Loaded

Mix = tuple[tuple[Loaded, float], ...]
"""What one sequence has: adapters, each with its weight. Empty for the base alone."""

Laid = dict[int, Routed]
"""Number of a site -> its adapters, laid out for the rows of a part."""


class BatchTerms:
    """Who has which adapters in the step that is being taken."""

    def __init__(self) -> None:
        self.known: list[tuple[Routing, Laid]] = []

    def look(self, mixes: Sequence[Mix], parts: Sequence[Part]) -> bool:
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
        return any(laid for _, laid in self.known)

    def before(self, part: int, site: int, x: Tensor) -> Tensor:
        """The input as the maps of the site should read it."""
        routed = self.known[part][1].get(site)
        return x if routed is None else routed.before(x)

    def after(self, part: int, site: int, x: Tensor, outs: Sequence[Tensor]) -> None:
        """Change the maps' outputs, in place."""
        routed = self.known[part][1].get(site)
        if routed is not None:
            routed.after(x, outs)


def _laid(adapters: Mapping[int, Loaded], routing: Routing, before: Laid) -> Laid:
    laid: Laid = {}
    for site in {site for one in adapters.values() for site in one.stacks}:
        stacks = {number: one.stacks[site] for number, one in adapters.items() if site in one.stacks}
        here = routing
        if len(stacks) < len(adapters):
            kept = tuple(tuple(entry for entry in mix if entry[0] in stacks) for mix in routing.mixes)
            here = Routing(kept, routing.lengths)
        laid[site] = Routed(stacks, here, before=before.get(site))
    return laid
