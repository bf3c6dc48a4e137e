"""Values of layers in the module's own place, where others' code reads its weight or bias without calling it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from gossamer.attachment.frozen import Frozen


class InPlace:
    """Puts what a site's innermost layers present in the module's own place, while a module runs that reads it there.

    Layers that stand beside calls have no part in that: they are let in where calls are all there is in evaluation, or
    where their change is zero.

    Args:
        frozen: the module that is read.
        standing: the innermost layers that run there at the moment, in stacking order.
        readers: the modules whose code reads it.
    """

    def __init__(self, frozen: Frozen, standing: Callable[[], Sequence[Any]], readers: Sequence[nn.Module]) -> None:
        self.frozen, self.standing, self.readers = frozen, standing, readers
        self.open: list[AbstractContextManager[None] | None] = []
        self.hooks: list[RemovableHandle] = []

    def enable(self) -> None:
        """Watch for the readers' runs. Before all other hooks: torch's old weight_norm computes the weight in one."""
        for reader in self.readers:
            self.hooks.append(reader.register_forward_pre_hook(self._enter, prepend=True))
            self.hooks.append(reader.register_forward_hook(self._leave, always_call=True))

    def disable(self) -> None:
        """Take the hooks away."""
        while self.hooks:
            self.hooks.pop().remove()

    def _enter(self, *_: Any) -> None:
        layers = self.standing()
        if not layers:
            self.open.append(None)
            return
        values = self.frozen.parameters()
        for layer in layers:
            values = layer.presented(values)
        place = self.frozen.replacing(values)
        place.__enter__()
        self.open.append(place)

    def _leave(self, *_: Any) -> None:
        place = self.open.pop() if self.open else None
        if place is not None:
            place.__exit__(None, None, None)
