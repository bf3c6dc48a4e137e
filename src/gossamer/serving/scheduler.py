"""Who takes part in the next step. Knows sequences and budgets, and no tensors.

Every sequence that is being continued takes part with its next token, so that none waits for a long prompt; what is
left of the budget reads prompts, piece by piece, those first that were begun first. New ones are let in as rows come
free: from the tenant that has had the fewest tokens so far. One that is not ready, as its adapters are being read, is
passed by for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

AHEAD = 8
"""How many of those who wait are looked at for one that is ready."""


class Sequence(Protocol):
    """What the scheduler knows of a sequence."""

    read: int
    """Tokens that are in the cache."""
    passed: int
    """How many were let in before it although it was its turn."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...

    @property
    def length(self) -> int:
        """Tokens that there are, drawn ones among them."""
        ...

    @property
    def most(self) -> int:
        """Tokens that there may be in the end."""
        ...

    @property
    def rests(self) -> bool:
        """Whether it takes no part in the next step."""
        ...


Item = TypeVar("Item", bound=Sequence)


@dataclass(frozen=True)
class Limits:
    """What a step may hold.

    Attributes:
        rows: sequences at a time.
        tokens: tokens of a step.
        waiting: sequences that wait to be let in; one more is turned away.
        cache: tokens whose keys and values may be held: rows in use times the longest sequence among them.
    """

    rows: int = 32
    tokens: int = 512
    waiting: int = 1024
    cache: int = 32768


class Scheduler(Generic[Item]):
    """Rows, and who waits for one.

    Attributes:
        running: the sequence in each row, rows 0, 1, 2, ...
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running: list[Item] = []
        self.queues: dict[str, deque[Item]] = {}
        self.had: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        """How many have no row yet."""
        return sum(map(len, self.queues.values()))

    def offer(self, item: Item) -> bool:
        """Let a sequence wait its turn; False when too many do."""
        if self.waiting >= self.limits.waiting:
            return False
        if item.tenant not in self.queues:
            # a tenant who comes late has no claim to what he did not ask for
            present = [self.had[tenant] for tenant in (*self.queues, *(one.tenant for one in self.running))]
            self.had[item.tenant] = max(self.had.get(item.tenant, 0), min(present, default=0))
            self.queues[item.tenant] = deque()
        self.queues[item.tenant].append(item)
        return True

    def withdraw(self, item: Item) -> bool:
        """Take back one that waits; False if it does not."""
        queue = self.queues.get(item.tenant, deque())
        if item not in queue:
            return False
        queue.remove(item)
        self._forget(item.tenant)
        return True

    def admit(self, ready: Callable[[Item], bool] = lambda _: True) -> list[Item]:
        """Give free rows to those who wait, and say to whom. `ready` is asked in the order of turns, and may begin."""
        admitted: list[Item] = []
        while len(self.running) < self.limits.rows and (item := self._next(ready)):
            self.queues[item.tenant].remove(item)
            self._forget(item.tenant)
            self.running.append(item)
            self.had[item.tenant] += item.length
            admitted.append(item)
        if len(self.running) == self.limits.rows:
            for item in self._coming():
                ready(item)
        return admitted

    def _coming(self) -> list[Item]:
        """Those whose turn it is next."""
        tenants = sorted(self.queues, key=lambda one: self.had[one])[:AHEAD]
        return [item for tenant in tenants for item in islice(self.queues[tenant], AHEAD)][:AHEAD]

    def _next(self, ready: Callable[[Item], bool]) -> Item | None:
        for tenant in sorted(self.queues, key=lambda one: self.had[one]):
            for item in islice(self.queues[tenant], AHEAD):
                if ready(item):
                    first = self.queues[tenant][0]
                    first.passed += first is not item
                    return item if self._fits(item) else None
                if item.passed > self.limits.rows:
                    return None
        return None

    def _fits(self, item: Item) -> bool:
        longest = max(item.most, *(one.most for one in self.running), 0)
        return (len(self.running) + 1) * longest <= self.limits.cache or not self.running

    def plan(self) -> list[tuple[int, int]]:
        """(row, tokens) of the next step: all that go on, then prompts as far as the budget reaches."""
        counts: dict[int, int] = {}
        ready = [row for row, item in enumerate(self.running) if item.length - item.read == 1 and not item.rests]
        for row in ready:
            counts[row] = 1
            self.had[self.running[row].tenant] = self.had.get(self.running[row].tenant, 0) + 1
        room = max(self.limits.tokens - len(ready), 1)
        for row, item in enumerate(self.running):
            if row not in counts and room > 0 and not item.rests:
                counts[row] = min(item.length - item.read, room)
                room -= counts[row]
        return sorted(counts.items())

    def leave(self, row: int) -> int | None:
        """Free a row. The last one in use takes its place; gives the row that it came from, if it was another."""
        last = self.running.pop()
        if row == len(self.running):
            return None
        self.running[row] = last
        return len(self.running)

    def _forget(self, tenant: str) -> None:
        if not self.queues[tenant]:
            del self.queues[tenant]
