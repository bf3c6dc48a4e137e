"""Which way of adding low-rank terms is fastest, by rows and adapters? What `kernels.routed.Routing.way` goes by.

One decoding step's terms at the widths of SmolLM2-135M, 30 layers: q and v, or every linear module. All ways give the
same numbers before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.common import Row, interleaved, report
from gossamer.kernels.routed import Routed
from gossamer.kernels.routing import LinearChange, Routing, Stack
from gossamer.linalg import LowRankPair

LAYERS, RANK, ROUNDS = 30, 8, 9
GROUPS = {
    "q, v": [((576, (576, 192, 192)), (True, False, True))],
    "all linear": [
        ((576, (576, 192, 192)), (True, True, True)),
        ((576, (576,)), (True,)),
        ((576, (1536, 1536)), (True, True)),
        ((1536, (576,)), (True,)),
    ],
}
WAYS = ("segmented", "concatenated", "gathered")
CASES = ((8, 1), (8, 2), (8, 8), (16, 16), (32, 1), (32, 2), (32, 4), (32, 8), (32, 16), (32, 32))
READ = ((8, 8, 64), (8, 8, 16), (8, 8, 4), (8, 8, 2), (32, 32, 4))


def measure() -> list[Row]:
    """Every way, for every case."""
    rows: list[Row] = []
    for targets, groups in GROUPS.items():
        for count, many, length in [*((*case, 1) for case in CASES), *READ]:
            mixes = tuple(((row % many, 1.0),) for row in range(count))
            rows += _case(targets, groups, Routing(mixes, (length,) * count), many)
    return rows


def _drawn(draw: torch.Generator, inner: int, out: int) -> LowRankPair:
    return LowRankPair(torch.randn(RANK, inner, generator=draw), torch.randn(out, RANK, generator=draw))


def _case(targets: str, groups: Any, routing: Routing, many: int) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    ways: dict[str, list[tuple[Routed, torch.Tensor, list[torch.Tensor]]]] = {way: [] for way in WAYS}
    for (inner, outs), adapted in groups * LAYERS:
        x = torch.randn(routing.rows, inner, generator=draw)
        stacks = {
            number: Stack.of(
                [LinearChange(_drawn(draw, inner, out)) if on else None for out, on in zip(outs, adapted, strict=True)],
                outs,
                x,
            )
            for number in range(many)
        }
        for way in WAYS:
            ways[way].append((Routed(stacks, routing, way), x, [torch.zeros(routing.rows, out) for out in outs]))
    for every in zip(*ways.values(), strict=True):
        for routed, x, outs in every:
            routed.after(x, outs)
        for other in every[1:]:
            for one, right in zip(other[2], every[0][2], strict=True):
                torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-3)
    steps: dict[str, Callable[[], None]] = {way: _runner(laid) for way, laid in ways.items()}
    times = interleaved(steps, rounds=ROUNDS, warmup=1)
    best = min(time.median for time in times.values())
    return [
        {
            "adapters on": targets,
            "sequences": len(routing.lengths),
            "tokens of each": routing.lengths[0],
            "adapters": many,
            "way": way,
            "chosen": "yes" if way == routing.way else "",
            "milliseconds": round(1e3 * time.median, 2),
            "of the fastest": round(time.median / best, 2),
        }
        for way, time in times.items()
    ]


def _runner(laid: list[tuple[Routed, torch.Tensor, list[torch.Tensor]]]) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        for routed, x, outs in laid:
            routed.after(x, outs)

    return run


if __name__ == "__main__":
    report("routed", "Which way of adding low-rank terms is fastest?", measure)
