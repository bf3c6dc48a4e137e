"""Steps that only continue sequences as CUDA graphs: recorded once for a size, then replayed by one launch.

Rows and the tokens that are looked at are rounded up to a few sizes. Tokens, places, and which slot a row's adapter is
in are copied into tensors that a graph reads, so that no switch of adapters and no coming or going of rows records
anything. Rows that only fill up the batch write to the spare row of the cache.

The plain twin is the step as it is run elsewhere.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.running.row_attention import RowAttention
from gossamer.running.row_cache import RowCache
from gossamer.running.steps import AdapterTerms, StepInput

StepFunction = Callable[[Tensor, RowAttention, RowCache, AdapterTerms | None], Tensor]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of a call one that does the same again on what its tensors hold by then."""

_SHORTEST = 256
"""Tokens that are looked at, at least; then twice as many, and so on."""


@dataclass(frozen=True)
class CapturedGraph:
    """A recorded step, and the tensors that it reads."""

    tokens: Tensor
    attention: RowAttention
    replay: Callable[[], Tensor]


class StepGraphs:
    """Recorded steps of one decoder.

    Args:
        run: takes a step. rotary: gives the angles of positions; not recorded, as some kinds look at the numbers.
        like: of the dtype and on the device that steps run in.
        record: with CUDA graphs by default.
    """

    def __init__(self, run: StepFunction, rotary: Any, like: Tensor, record: Capture | None = None) -> None:
        self.run, self.rotary, self.like = run, rotary, like
        self.record = record or GraphCapture()
        self.made: dict[tuple[int, int, Hashable], CapturedGraph] = {}
        self.where: tuple[RowCache, int] | None = None

    def __call__(self, step: StepInput, cache: RowCache, terms: AdapterTerms | None) -> Tensor | None:
        """Logits (N, vocabulary), which are overwritten by the next step; None for a step that is not recorded."""
        laid = frozenset() if terms is None else terms.fixed()
        if laid is None or not _goes_on(step):
            return None
        self._forget(cache, laid)
        count, longest = step.extent
        size, longest = _size(count), min(_power(longest, _SHORTEST), cache.tokens)
        graph = self.made.get((size, longest, laid))
        if graph is None:
            graph = self.made[size, longest, laid] = self._captured(min(size, cache.rows), longest, step, cache, terms)
        else:
            self._place(graph.tokens, graph.attention, step, cache)
        return graph.replay()[:count]

    def _captured(
        self, size: int, longest: int, step: StepInput, cache: RowCache, terms: AdapterTerms | None
    ) -> CapturedGraph:
        tokens, rows, positions = torch.zeros(3, size, dtype=torch.int64, device=self.like.device)
        attention = RowAttention(rows, positions, torch.arange(size, device=self.like.device), size, longest)
        self._place(tokens, attention, step, cache)

        def run() -> Tensor:
            attention.masks.clear()
            return self.run(tokens, attention, cache, terms)

        return CapturedGraph(tokens, attention, self.record(run))

    def _place(self, tokens: Tensor, attention: RowAttention, step: StepInput, cache: RowCache) -> None:
        """Copy a step into the tensors that a graph reads; padding rows write to the spare row of the cache."""
        spare = len(tokens) - len(step.chunks)
        tokens[: len(step.tokens)] = step.tokens
        attention.rows.copy_(torch.tensor([chunk.row for chunk in step.chunks] + [cache.rows] * spare))
        attention.positions.copy_(torch.tensor([chunk.start for chunk in step.chunks] + [0] * spare))
        attention.set_angles(self.rotary, self.like)

    def _forget(self, cache: RowCache, laid: Hashable) -> None:
        """Graphs of a cache that was laid anew, and of adapters' tensors that are used no more."""
        where = cache, cache.laid
        if self.where != where:
            self.made.clear()
            self.where = where
        if laid:
            self.made = {key: graph for key, graph in self.made.items() if key[2] in (frozenset(), laid)}


class GraphCapture:
    """Records on CUDA. All recordings share memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run once, for what is compiled or chosen at a first call, and once to record."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on: adapters are read while this one records
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _goes_on(step: StepInput) -> bool:
    """Whether rows 0, 1, 2, ... are all continued, in this order, and all logits wanted."""
    return len(step.wanted) == len(step.chunks) and all(
        chunk.continues and chunk.row == row for row, chunk in enumerate(step.chunks)
    )


def _power(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _size(count: int) -> int:
    """1, 2, 4, 8, and then multiples of 8 up to 32, of 16 up to 64, of 32 from there on."""
    step = 8 if count <= 32 else 16 if count <= 64 else 32
    return _power(count, 1) if count <= 8 else -(-count // step) * step
