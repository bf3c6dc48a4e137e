"""Values of layers in the module's own place, where others' code reads its weight or bias without calling it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from gossamer.errors import StateError

if TYPE_CHECKING:
    from gossamer.attachment.site import Site


class InPlace:
    """Puts what a site's innermost layers present in the module's own place, while a module runs that reads it there.

    Layers that stand beside calls have no part in that: they are let in where calls are all there is in evaluation, or
    where their change is zero.
    """

    def __init__(self, site: Site, readers: Sequence[nn.Module]) -> None:
        self.site, self.readers = site, readers
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
        layers: list[Any] = self.site.standing(self._running())
        if not layers:
            self.open.append(None)
            return
        values = self.site.frozen.parameters()
        for layer in layers:
            values = layer.presented(values)
        place = self.site.frozen.replacing(values)
        place.__enter__()
        self.open.append(place)

    def _leave(self, *_: Any) -> None:
        place = self.open.pop() if self.open else None
        if place is not None:
            place.__exit__(None, None, None)

    def _running(self) -> tuple[str, ...]:
        """The innermost layers of all rows. Raises `StateError` where rows differ in them."""
        inner = {name for name, layer in self.site.layers.items() if layer.innermost}
        here = {tuple(name for name in mix if name in inner) for mix in self.site.host.active.mixes}
        if len(here) > 1:
            raise StateError(
                "rows with different adapters cannot share a parameter that is read without calling its module",
                where=self.site.path,
                got=", ".join(sorted("+".join(mix) or "the base" for mix in here)),
                hint="run the adapters in batches of their own",
            )
        return here.pop() if here else ()
