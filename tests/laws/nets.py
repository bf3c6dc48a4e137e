"""Random small nets for the laws: nested containers of linear modules, in any dtype, biased or not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float64: 1e-6}  # factors are float32 on every base


class Tower(nn.Module):
    """Numbered blocks, one after another, so that layer indices mean something."""

    def __init__(self, widths: list[int], biased: list[bool], conv: list[bool], depth: int) -> None:
        super().__init__()
        blocks = []
        for (inner, outer), bias, turned in zip(pairwise(widths), biased, conv, strict=False):
            module: nn.Module = Conv1D(outer, inner) if turned else nn.Linear(inner, outer, bias=bias)
            for _ in range(depth):
                module = nn.ModuleDict({"inner": module})
            blocks.append(module)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            while isinstance(block, nn.ModuleDict):
                block = block["inner"]
            x = torch.tanh(block(x))
        return self.norm(x)


@dataclass(frozen=True)
class Case:
    """A recipe for a net and its input; building it twice gives the same bits."""

    widths: tuple[int, ...]
    biased: tuple[bool, ...]
    conv: tuple[bool, ...]
    depth: int
    dtype: torch.dtype
    seed: int

    def net(self) -> Tower:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = Tower([*self.widths], [*self.biased], [*self.conv], self.depth)
            for parameter in net.parameters():
                nn.init.normal_(parameter, std=0.3)
        return net.to(self.dtype).eval()

    def x(self, rows: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(rows, 2, self.widths[0], generator=generator).to(self.dtype)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two to four layers of width 2 to 12."""
    count = draw(st.integers(2, 4))
    flags = st.lists(st.booleans(), min_size=count, max_size=count).map(tuple)
    widths = draw(st.lists(st.integers(2, 12), min_size=count + 1, max_size=count + 1).map(tuple))
    return Case(
        widths,
        draw(flags),
        draw(flags),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )
