"""The fast way through a model: packed rows and fused blocks, wherever they compute the same as the plain way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from gossamer.attachment import active
from gossamer.attachment.walk import CONTAINER
from gossamer.running.blocks import blocks
from gossamer.running.packed import obstacle, packed_attention

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Fast:
    """How batches go through a model.

    Attributes:
        packed: rows stand one after another instead of being padded.
        shared: what all rows of a batch begin with is computed once.
        fused: decoder layers whose backward is written out.
        rule: the line that says so, and why not where it is not so.
    """

    packed: bool
    shared: bool
    fused: int
    rule: str

    def options(self, *, shared: bool | None = None) -> dict[str, bool]:
        """Arguments of `collate`; `shared` for rows of an adapter of its own among several."""
        return {"packed": self.packed, "shared": self.shared if shared is None else self.packed and shared}


@contextmanager
def fast_path(model: nn.Module, *, packing: bool = True, fused: bool = True) -> Iterator[Fast]:
    """Take the fast way for as long as the context is open, backward passes included; then all is as it was.

    Args:
        packing: False pads.
        fused: False leaves the model's own layers in place; adapters beside linear modules are fused all the same.
    """
    why = obstacle(model) if packing else "switched off"
    running = active(model)
    dropped = drops_out(model, [name for one in running for name in ([one] if isinstance(one, str) else one)])
    with ExitStack() as stack:
        if not why:
            stack.enter_context(packed_attention(model))
        count = stack.enter_context(blocks(model)) if fused else 0
        shared = ", rows that begin alike share it" if not dropped else ""
        said = f"packing: off, {why}" if why else f"packing: on{shared}"
        yield Fast(not why, not why and not dropped, count, f"{said}; {count} layers with a fused backward")


def drops_out(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether training draws random numbers inside the model or the named adapters.

    What rows share would then share those too, and rows of several adapters would draw from one sequence.
    """

    def rate(module: nn.Module) -> float:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return module.p
        own = getattr(module, "dropout", 0.0)
        return own if isinstance(own, float) else 0.0

    return any(rate(module) > 0 and _runs(path.split("."), names) for path, module in model.named_modules())


def _runs(path: list[str], names: Sequence[str]) -> bool:
    """Whether a module is the model's own or one of the named adapters'."""
    return CONTAINER not in path or any(name in names for name in path[path.index(CONTAINER) + 1 :][:1])
