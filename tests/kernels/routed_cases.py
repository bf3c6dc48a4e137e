"""Checks of the slotted way, on any device: it equals the plain loop, and rows of the base are left alone."""

from __future__ import annotations

import torch

from gossamer.kernels.routed import Routed, reference
from gossamer.kernels.routing import LinearChange, Routing, Stack
from gossamer.linalg import LowRankPair

INNER, OUTS = 150, (70, 300, 5)
BATCHES = [[0, 1, 2, 3], [-1, 0, 0, 3, 2], [4, -1], [1, 4, 4, 4, 3, 2, 0, 1, -1]]


def check(dtype: torch.dtype, device: str = "cpu") -> None:
    """Five adapters of ranks 0 to 6, in batches one after another that share their slots."""
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=draw) / size[-1] ** 0.5).to(dtype).to(device)

    like = torch.zeros(1, INNER, dtype=dtype, device=device)
    ranks = [[3, 0, 1], [1, 6, 2], [2, 2, 2], [0, 0, 4], [5, 1, 0]]
    stacked = {
        number: Stack.of(
            [
                LinearChange(LowRankPair(random(r, INNER), random(o, r))) if r else None
                for r, o in zip(own, OUTS, strict=True)
            ],
            OUTS,
            like,
        )
        for number, own in enumerate(ranks)
    }
    maps = [(random(out, INNER), None) for out in OUTS]
    before = None
    for numbers in BATCHES:
        mixes = tuple(((number, 1.0),) if number >= 0 else () for number in numbers)
        routing, x = Routing(mixes, (1,) * len(mixes)), random(len(mixes), INNER)
        before = Routed({number: stacked[number] for number in {*numbers} - {-1}}, routing, "slotted", before)
        outs = [x @ weight.T for weight, _ in maps]
        bare = [out.clone() for out in outs]
        before.after(x, outs)
        wide = {
            number: Stack.joined([pair.to(torch.float64) for pair in stack.pairs]) for number, stack in stacked.items()
        }
        right = reference(x.double(), [(weight.double(), None) for weight, _ in maps], wide, routing)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for out, plain, known in zip(outs, bare, right, strict=True):
            torch.testing.assert_close(out.double(), known, rtol=tolerance, atol=tolerance)
            for row, number in enumerate(numbers):
                assert number >= 0 or torch.equal(out[row], plain[row])
