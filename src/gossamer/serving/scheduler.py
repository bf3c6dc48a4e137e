"""Which sequences take part in the next step. Knows sequences and budgets, and no tensors.

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
from typing import TYPE_CHECKING

from gossamer.serving.sequence import SequenceState

if TYPE_CHECKING:
    from gossamer.serving.sequence import Sequence

AHEAD = 8
"""How many of those that wait are looked at for one that is ready."""


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


class Scheduler:
    """Rows, and the sequences that wait for one.

    Attributes:
        running: the sequence in each row, rows 0, 1, 2, ...
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running: list[Sequence] = []
        self.queues: dict[str, deque[Sequence]] = {}
        self.had: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        """How many have no row yet."""
        return sum(map(len, self.queues.values()))

    def offer(self, sequence: Sequence) -> bool:
        """Let a sequence wait its turn; False when too many do."""
        if self.waiting >= self.limits.waiting:
            return False
        tenant = sequence.tenant
        if tenant not in self.queues:
            # a tenant that comes late has no claim to what it did not ask for
            present = [self.had[other] for other in (*self.queues, *(one.tenant for one in self.running))]
            self.had[tenant] = max(self.had.get(tenant, 0), min(present, default=0))
            self.queues[tenant] = deque()
        self.queues[tenant].append(sequence)
        sequence.state = SequenceState.WAITING
        return True

    def withdraw(self, sequence: Sequence) -> bool:
        """Take back one that waits; False if it does not."""
        if sequence.state is not SequenceState.WAITING:
            return False
        queue = self.queues[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self.queues[sequence.tenant]
        sequence.state = SequenceState.NEW
        return True

    def admit(self, ready: Callable[[Sequence], bool] = lambda _: True) -> list[Sequence]:
        """Give free rows to those that wait, and say to which. `ready` is called in the order of turns, and may begin
        what makes one ready."""
        admitted: list[Sequence] = []
        while len(self.running) < self.limits.rows and (sequence := self._next(ready)):
            self.withdraw(sequence)
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
            self.had[sequence.tenant] += sequence.length
            admitted.append(sequence)
        if len(self.running) == self.limits.rows:
            coming = (one for tenant in self._turns()[:AHEAD] for one in islice(self.queues[tenant], AHEAD))
            for sequence in islice(coming, AHEAD):
                ready(sequence)
        return admitted

    def _turns(self) -> list[str]:
        """The tenants whose sequences wait, that with the fewest tokens first."""
        return sorted(self.queues, key=lambda tenant: self.had[tenant])

    def _next(self, ready: Callable[[Sequence], bool]) -> Sequence | None:
        for tenant in self._turns():
            for sequence in islice(self.queues[tenant], AHEAD):
                if ready(sequence):
                    first = self.queues[tenant][0]
                    first.passed += first is not sequence
                    return sequence if self._fits(sequence) else None
                if sequence.passed > self.limits.rows:
                    return None
        return None

    def _fits(self, sequence: Sequence) -> bool:
        longest = max(sequence.most, *(one.most for one in self.running), 0)
        return (len(self.running) + 1) * longest <= self.limits.cache or not self.running

    def plan(self) -> list[tuple[int, int]]:
        """(row, tokens) of the next step: all that go on, then prompts as far as the budget reaches."""
        counts: dict[int, int] = {}
        active = [(row, one) for row, one in enumerate(self.running) if one.state is SequenceState.RUNNING]
        for row, sequence in active:
            if sequence.length - sequence.read == 1:
                counts[row] = 1
                self.had[sequence.tenant] = self.had.get(sequence.tenant, 0) + 1
        room = max(self.limits.tokens - len(counts), 1)
        for row, sequence in active:
            if row not in counts and room > 0:
                counts[row] = min(sequence.length - sequence.read, room)
                room -= counts[row]
        return sorted(counts.items())

    def leave(self, row: int) -> int | None:
        """Free a row. The last one in use takes its place; gives the row that it came from, if it was another."""
        last = self.running.pop()
        if row == len(self.running):
            return None
        self.running[row] = last
        return len(self.running)
