"""Random small nets for the laws: nested containers of linear modules, and decoders, in any dtype, biased or not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.laws.specs import ROOTED

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
        self.norm = nn.LayerNorm(
            widths[-1], eps=0.1
        )  # two nearly equal numbers must not become a rounding error's sign

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            while isinstance(block, nn.ModuleDict):
                block = block["inner"]
            x = torch.tanh(block(x))
        return self.norm(x)


class Decoder(LlamaForCausalLM):
    """A language model that returns its logits alone."""

    def forward(self, input_ids: Tensor | None = None, past_key_values: Any = None, **others: Any) -> Any:
        out = super().forward(input_ids, past_key_values=past_key_values, **others)
        return out.logits


class Case(Protocol):
    """A recipe for a net and its input; building it twice gives the same bits."""

    dtype: torch.dtype
    seed: int

    def net(self) -> nn.Module:
        """The net, in evaluation mode."""
        ...

    def x(self, rows: int = 3) -> Tensor:
        """An input of so many rows."""
        ...

    @property
    def tolerance(self) -> float:
        """How far two ways to the same output may part, absolutely and relatively."""
        ...


@dataclass
class TowerCase:
    """A tower of linear modules, fed with numbers."""

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


@dataclass
class DecoderCase:
    """A decoder, fed with token ids."""

    layers: int
    heads: int
    shared: int
    size: int
    dtype: torch.dtype
    seed: int

    def net(self) -> Decoder:
        width = self.heads * self.size
        config = LlamaConfig(
            vocab_size=17,
            hidden_size=width,
            head_dim=self.size,
            intermediate_size=width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // self.shared,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = Decoder(config)
        return net.to(self.dtype).eval()  # pyright: ignore[reportArgumentType]

    def x(self, rows: int = 3) -> Tensor:
        return torch.randint(17, (rows, 4), generator=torch.Generator().manual_seed(self.seed))

    @property
    def tolerance(self) -> float:
        return {torch.float32: 1e-4, torch.bfloat16: 2e-1, torch.float64: 1e-6}[self.dtype]


def cases(method: str) -> st.SearchStrategy[Case]:
    """Recipes of the nets that a method stands at."""
    return decoders() if method in ROOTED else towers()


@st.composite
def decoders(draw: st.DrawFn) -> DecoderCase:
    """One or two layers, grouped heads or not."""
    shared = draw(st.sampled_from([1, 2]))
    return DecoderCase(
        draw(st.integers(1, 2)),
        shared * draw(st.integers(1, 2)),
        shared,
        draw(st.sampled_from([4, 8])),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )


@st.composite
def towers(draw: st.DrawFn) -> TowerCase:
    """Two to four layers of width 2 to 12."""
    count = draw(st.integers(2, 4))
    flags = st.lists(st.booleans(), min_size=count, max_size=count).map(tuple)
    widths = draw(st.lists(st.integers(2, 12), min_size=count + 1, max_size=count + 1).map(tuple))
    return TowerCase(
        widths,
        draw(flags),
        draw(flags),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )
