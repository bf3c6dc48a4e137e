"""What an engine asks of a model: one step of many sequences, each at another place and with other adapters.

A step takes tokens of several sequences one after another, (N,): the next token of those that are being continued, and
chunks of prompts that are being read. A decoder runs them in parts, and asks for the adapters' terms of one part at a
time at each of its sites.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from gossamer.running.row_cache import RowCache


class Chunk(NamedTuple):
    """The next `length` tokens of one sequence, of which `start` are in the cache's row already."""

    row: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """Tokens of the sequence that are in the row after it."""
        return self.start + self.length

    @property
    def continues(self) -> bool:
        """Whether this is the next token of a sequence whose prompt is read."""
        return self.length == 1 and self.start > 0


@dataclass(frozen=True)
class StepInput:
    """What goes through the model at once.

    Attributes:
        tokens: (N,) ids, chunk after chunk.
        chunks: cover them, each of another row; those that continue a sequence come first.
        wanted: numbers of the chunks after whose last token the logits are wanted, ascending.
    """

    tokens: Tensor
    chunks: tuple[Chunk, ...]
    wanted: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and tokens that the cache must have room for."""
        return max(chunk.row for chunk in self.chunks) + 1, max(chunk.end for chunk in self.chunks)


class LinearGroup(NamedTuple):
    """Maps that read the same input, where adapters may add terms.

    Attributes:
        paths: canonical module paths, as in an adapter's file.
        modules: the frozen maps there, each with `in_features` and `out_features`, or transformers' Conv1D.
    """

    paths: tuple[str, ...]
    modules: tuple[nn.Module, ...]


ChunkRows = tuple[tuple[int, int], ...]
"""What is run at once: (number of the chunk, rows of it), one after another."""


class AdapterTerms(Protocol):
    """The adapters' share of a step. `part` counts the decoder's parts, `site` its sites."""

    def at(self, part: int, site: int) -> bool:
        """Whether anything may be changed there."""
        ...

    def before(self, part: int, site: int, x: Tensor) -> Tensor:
        """The input (rows of the part, in) as the maps should read it; x itself where nothing changes it."""
        ...

    def after(self, part: int, site: int, x: Tensor, outs: Sequence[Tensor], whole: Tensor | None = None) -> None:
        """Change the maps' outputs (rows of the part, out) for the input that they have read, in place.

        Args:
            whole: what the outputs are columns of, one after the other, if they are.
        """
        ...

    def fixed(self) -> Hashable | None:
        """What `after` reads in this step, the same for as long as only the contents change; None if it moves."""
        ...


class Decoder(Protocol):
    """A causal model, one step at a time. Reads the model's weights where they are, and leaves it as it was."""

    like: Tensor
    """Of the dtype and on the device that steps run in."""
    sites: tuple[LinearGroup, ...]
    copied: int
    """Bytes of weights that are held beside the model's own."""

    def cache(self, rows: int = 0, tokens: int = 0) -> RowCache:
        """An empty cache, which will often hold so many rows of so many tokens; it grows where it must."""
        ...

    def parts(self, step: StepInput) -> Sequence[ChunkRows]:
        """How a step will be run; empty parts are allowed."""
        ...

    def __call__(self, step: StepInput, cache: Any, terms: AdapterTerms | None = None) -> Tensor:
        """Take a step: write keys and values of its tokens, and give the logits that are wanted.

        Returns:
            (wanted, vocabulary) in the model's dtype.
        """
        ...
