"""A module whose weight or bias others' code reads without calling it: its layers' values lie there while those run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from gossamer.attachment.site import Active, Site
from gossamer.errors import StateError
from gossamer.methods import Shape

if TYPE_CHECKING:
    from gossamer.attachment.host import Host


class ReadSite(Site):
    """A site whose innermost layers are also in place while a module runs that reads the parameters they stand for.

    Layers that stand beside calls have no part in that: they are let in where calls are all there is in evaluation, or
    where their change is zero.
    """

    def __init__(self, shape: Shape, module: nn.Module, host: Host, readers: Sequence[nn.Module]) -> None:
        self.readers = readers
        self.open: list[AbstractContextManager[None] | None] = []
        self.hooks: list[RemovableHandle] = []
        super().__init__(shape, module, host)

    def enable(self) -> None:
        """Watch for the readers' runs. Before all other hooks: torch's old weight_norm computes the weight in one."""
        super().enable()
        for reader in self.readers:
            self.hooks.append(reader.register_forward_pre_hook(self._enter, prepend=True))
            self.hooks.append(reader.register_forward_hook(self._leave, always_call=True))

    def disable(self) -> None:
        """Take the hooks away."""
        super().disable()
        while self.hooks:
            self.hooks.pop().remove()

    def _enter(self, *_: Any) -> None:
        layers = self.standing(self._running())
        if not layers:
            self.open.append(None)
            return
        values = self.frozen.parameters()
        for layer in layers:
            values = layer.presented(values)  # pyright: ignore[reportCallIssue]
        place = self.frozen.replacing(values)
        place.__enter__()
        self.open.append(place)

    def _leave(self, *_: Any) -> None:
        place = self.open.pop() if self.open else None
        if place is not None:
            place.__exit__(None, None, None)

    def _running(self) -> Active:
        """The innermost layers of all rows; raises `StateError` where rows differ in them."""
        inner = {name for name, layer in self.layers.items() if layer.innermost}
        here = {tuple(name for name in entry if name in inner) for entry in self.host.active.mixes}
        if len(here) > 1:
            raise StateError(
                "rows with different adapters cannot share a parameter that is read without calling its module",
                where=self.path,
                got=", ".join(sorted("+".join(entry) or "the base" for entry in here)),
                hint="run the adapters in batches of their own",
            )
        return here.pop() if here else ()
