"""What an engine asks of a model: one step of many sequences, each at another place and with other adapters.

A step takes tokens of several sequences one after another, (N,): the next token of those that are being continued, and
pieces of prompts that are being read. A decoder runs them in parts, and asks for the adapters' terms of one part at a
time at each of its sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Piece(NamedTuple):
    """Tokens of one sequence: `count` of them, of which `start` are in the cache's row already."""

    row: int
    start: int
    count: int

    @property
    def continues(self) -> bool:
        """Whether this is the next token of a sequence whose prompt is read."""
        return self.count == 1 and self.start > 0


@dataclass(frozen=True)
class Step:
    """What goes through the model at once.

    Attributes:
        tokens: (N,) ids, piece after piece.
        pieces: cover them, each of another row; those that continue a sequence come first.
        wanted: numbers of the pieces after whose last token the logits are asked for, ascending.
    """

    tokens: Tensor
    pieces: tuple[Piece, ...]
    wanted: tuple[int, ...]


class Site(NamedTuple):
    """Maps that read the same input, where adapters may add terms.

    Attributes:
        paths: canonical module paths, as in an adapter's file.
        modules: the frozen maps there, each with `in_features` and `out_features`, or transformers' Conv1D.
    """

    paths: tuple[str, ...]
    modules: tuple[nn.Module, ...]


Part = tuple[tuple[int, int], ...]
"""What is run at once: (number of the piece, rows of it), one after another."""


class Terms(Protocol):
    """The adapters' share of a step. `part` counts the decoder's parts, `site` its sites."""

    def before(self, part: int, site: int, x: Tensor) -> Tensor:
        """The input (rows of the part, in) as the maps should read it; x itself where nothing changes it."""
        ...

    def after(self, part: int, site: int, x: Tensor, outs: Sequence[Tensor]) -> None:
        """Change the maps' outputs (rows of the part, out) for the input that they have read, in place."""
        ...


class Kept(Protocol):
    """Keys and values of the first tokens of a sequence, apart from any row."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        ...


class RowCache(Protocol):
    """Keys and values of sequences, one a row; rows in use are kept together by whoever uses it."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a row the first tokens of another."""
        ...

    def keep(self, row: int, tokens: int) -> Kept:
        """A copy of a row's first tokens, no larger than they are."""
        ...

    def give(self, row: int, kept: Any, tokens: int) -> None:
        """Give a row the first tokens of what was kept."""
        ...

    def trim(self) -> None:
        """Nobody is there: let go of what was made for long sequences."""
        ...


class Decoder(Protocol):
    """A causal model, one step at a time. Reads the model's weights where they are, and leaves it as it was."""

    like: Tensor
    """Of the dtype and on the device that steps run in."""
    sites: tuple[Site, ...]
    copied: int
    """Bytes of weights that are held beside the model's own."""

    def cache(self, rows: int) -> RowCache:
        """An empty cache with so many rows."""
        ...

    def parts(self, step: Step) -> Sequence[Part]:
        """How a step will be run; empty parts are allowed."""
        ...

    def __call__(self, step: Step, cache: Any, terms: Terms | None = None) -> Tensor:
        """Take a step: write keys and values of its tokens, and give the logits that are wanted.

        Returns:
            (wanted, vocabulary) in the model's dtype.
        """
        ...
