"""Keys and values of prompts that were read before, for requests that begin alike.

What is kept belongs to a tenant and to the very adapters, by digest and weight, that it was computed with: nobody else
finds it, neither its numbers nor, by the clock, that it is there.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from gossamer.running.row_cache import KeptRow

LEAST = 16
"""Tokens below which reading again costs less than keeping."""


@dataclass(frozen=True, eq=False)
class _Entry:
    owner: Hashable
    tokens: tuple[int, ...]
    kept: KeptRow


class PrefixCache:
    """What was read, as much of it as there is room for; what was used longest ago goes first.

    Args:
        memory: bytes of keys and values; 0 keeps nothing.

    Attributes:
        hits, tokens: requests that found something, and the tokens that they did not have to read.
    """

    def __init__(self, memory: int) -> None:
        self.memory, self.size = memory, 0
        self.hits = self.tokens = 0
        self.entries: dict[Hashable, OrderedDict[_Entry, None]] = {}
        self.order: OrderedDict[_Entry, None] = OrderedDict()

    def find(self, owner: Hashable, tokens: Sequence[int]) -> tuple[KeptRow, int] | None:
        """The entry that begins most alike, and how many tokens alike: never all, as the last must be run."""
        best, longest = None, LEAST - 1
        for entry in self.entries.get(owner, ()):
            alike = common(entry.tokens, tokens)
            if alike > longest:
                best, longest = entry, alike
        if best is None:
            return None
        self.order.move_to_end(best)
        self.hits += 1
        self.tokens += longest
        return best.kept, longest

    def wants(self, owner: Hashable, tokens: Sequence[int]) -> bool:
        """Whether keeping these would bring anything."""
        here = self.entries.get(owner, ())
        return (
            bool(self.memory)
            and len(tokens) >= LEAST
            and not any(entry.tokens[: len(tokens)] == tuple(tokens) for entry in here)
        )

    def add(self, owner: Hashable, tokens: Sequence[int], kept: KeptRow) -> None:
        """Keep them, instead of entries that they begin with."""
        fresh = _Entry(owner, tuple(tokens), kept)
        for entry in [*self.entries.get(owner, ())]:
            if fresh.tokens[: len(entry.tokens)] == entry.tokens:
                self._drop(entry)
        self.entries.setdefault(owner, OrderedDict())[fresh] = None
        self.order[fresh] = None
        self.size += kept.nbytes
        while self.size > self.memory:
            self._drop(next(iter(self.order)))

    def _drop(self, entry: _Entry) -> None:
        del self.order[entry], self.entries[entry.owner][entry]
        if not self.entries[entry.owner]:
            del self.entries[entry.owner]
        self.size -= entry.kept.nbytes


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with, the last of `other` not among them."""
    most = min(len(one), len(other) - 1)
    return next((place for place in range(most) if one[place] != other[place]), most)
