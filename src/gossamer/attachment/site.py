"""One module that carries adapter layers: which of them run, around which call, for which rows.

The module stays in the model's tree under its own name and class. While adapters stand at it, its `forward` is this
site's, and its layers are children under the name `gossamer`, so `.to()`, `.train()` and `.parameters()` reach them.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attachment.frozen import Frozen, Stacked, owner, parameters_of
from gossamer.attachment.in_place import InPlace
from gossamer.attachment.walk import CONTAINER
from gossamer.errors import StateError
from gossamer.kernels.routing import Routing
from gossamer.methods import Layer, Shape
from gossamer.methods.base import AFFINE_KINDS
from gossamer.quant import QuantizedLinear

Active = tuple[str, ...]
"""Names whose layers run, in order."""
BASE_ALONE: Routing[Active] = Routing.everywhere(())
"""No adapter, whatever comes."""


class ActiveAdapters:
    """Which adapters of a model run, and for which rows; its sites all look here."""

    active = BASE_ALONE

    @contextmanager
    def running(self, routing: Routing[Active]) -> Iterator[None]:
        """While open, these adapters run, each for its rows."""
        before, self.active = self.active, routing
        try:
            yield
        finally:
            self.active = before


class Site:
    """A module, the layers that stand at it, and the frozen call they stand beside."""

    def __init__(
        self,
        shape: Shape,
        module: nn.Module,
        adapters: ActiveAdapters,
        bypassed: bool = False,
        readers: Sequence[nn.Module] = (),
    ) -> None:
        self.path, self.shape, self.module, self.adapters = shape.path, shape, module, adapters
        self.frozen = Frozen(shape, module)
        self.in_place = InPlace(self.frozen, self._shared_by_rows, readers)
        self.bypassed, self.hook = bypassed, None
        self.layers = nn.ModuleDict()
        vars(self.layers)["outer"] = self.frozen.outer  # for whoever asks what this module's forward does
        module.add_module(CONTAINER, self.layers)
        self.enable()

    def add(self, name: str, layer: Layer) -> None:
        """Stand a layer here."""
        self.layers._modules[name] = layer  # ModuleDict itself would refuse names such as "half" or "train"

    def enable(self) -> None:
        """Let calls of the module pass through this site."""
        self.module.forward = self.run if self.shape.kind in AFFINE_KINDS else self._with_signature()
        if self.bypassed:  # torch's encoder layer reads weights of parts it does not call, unless a part has a hook
            self.hook = self.module.register_forward_pre_hook(lambda *_: None)
        self.in_place.enable()

    def _with_signature(self) -> Callable[..., Any]:
        """`run` with the module's own signature, which transformers reads to know what a model takes."""
        original = self.frozen.outer or functools.partial(type(self.module).forward, self.module)
        signature = inspect.signature(original) if self.shape.kind == "model" else None

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if signature is not None and args:  # a model's layer asks for its inputs by name
                args, kwargs = (), {**signature.bind_partial(*args).arguments, **kwargs}
            return self.run(*args, **kwargs)

        return forward

    def disable(self) -> None:
        """Let calls of the module reach it as if nothing stood there: not even a Python frame is added."""
        if self.hook is not None:
            self.hook.remove()
        if self.frozen.outer is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self.frozen.outer
        self.in_place.disable()

    def remove(self) -> None:
        """Leave the module as it was found."""
        self.disable()
        del self.module._modules[CONTAINER]

    # The adapted call ------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward while adapters are attached: the active layers around the frozen call."""
        routing = self.adapters.active
        if not args and len(kwargs) == 1 and self.shape.kind in AFFINE_KINDS:  # `linear(input=x)`
            args, kwargs = (*kwargs.values(),), {}
        if routing.unit == "row":
            return self._run_rows(routing.mixes, args, kwargs)
        if routing.unit == "token":
            return self._run_spans(routing, args, kwargs)
        return self._stacked(routing.mixes[0])(*args, **kwargs)

    def _stacked(self, active: Active) -> Callable[..., Any]:
        call: Any = self.frozen
        for layer in self.standing(active):
            call = Stacked(layer, call)
        return call

    def standing(self, active: Active) -> list[Layer]:
        """The layers of the named adapters here, in stacking order; those that stand for parameters come first."""
        layers: list[Any] = [self.layers[name] for name in active if name in self.layers]
        return sorted(layers, key=lambda layer: not layer.innermost) if len(layers) > 1 else layers

    def _shared_by_rows(self) -> list[Layer]:
        """The innermost layers of all rows. Raises `StateError` where rows differ in them."""
        inner = {name for name, layer in self.layers.items() if layer.innermost}
        here = {tuple(name for name in mix if name in inner) for mix in self.adapters.active.mixes}
        if len(here) > 1:
            raise StateError(
                "rows with different adapters cannot share a parameter that is read without calling its module",
                where=self.path,
                got=", ".join(sorted("+".join(mix) or "the base" for mix in here)),
                hint="run the adapters in batches of their own",
            )
        return self.standing(here.pop()) if here else []

    def _run_rows(self, rows: Sequence[Active], args: tuple, kwargs: dict) -> Any:
        """One adapter (or none) for every row of the batch: the plain way, one call for each distinct entry."""
        here = [tuple(name for name in entry if name in self.layers) for entry in rows]
        if not any(here):
            return self.frozen(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise StateError(
                "a key-value cache cannot be shared by rows with different virtual tokens",
                hint="call the model without one, or generate for each adapter apart",
            )
        entries = rows if self.shape.kind == "model" else here  # what runs inside a model stands elsewhere too
        share = self._rows_share(len(rows), args, kwargs)
        outs, order = [], []
        for entry in dict.fromkeys(entries):
            chosen = [row for row, other in enumerate(entries) if other == entry]
            index = torch.tensor(
                [row * share + part for row in chosen for part in range(share)], device=self.shape.device
            )
            whole = len(rows) * share
            with self.adapters.running(Routing.everywhere(entry)):
                outs.append(self._stacked(entry)(*_picked(args, index, whole), **_picked(kwargs, index, whole)))
            order.append(index)
        return _joined(outs, torch.cat(order).argsort(), self.path)

    def _rows_share(self, rows: int, args: tuple, kwargs: dict) -> int:
        """How many entries along the first dimension one row of the batch has: 1, but all its tokens for experts."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        if not tensors:
            raise StateError("one adapter a row needs a batch, and no tensor came in", where=self.path)
        first = tensors[0].shape[0]
        share = first // rows if self.shape.kind == "experts" else 1
        if self.shape.kind == "attention" and not getattr(self.module, "batch_first", True):
            raise StateError("one adapter a row needs attention with batch_first=True", where=self.path)
        if share * rows != first:
            raise StateError(
                "one adapter a row needs one entry for each row of the batch",
                where=self.path,
                got=f"{rows} entries, input of shape {tuple(tensors[0].shape)}",
            )
        return share

    def _run_spans(self, routing: Routing[Active], args: tuple, kwargs: dict) -> Any:
        """The plain way for a packed row: one call for each span, put together again."""
        if not any(name in self.layers for names in routing.mixes for name in names):
            return self.frozen(*args, **kwargs)
        first, whole = args[0], routing.rows
        along = 0 if first.shape[0] == whole else 1
        if self.shape.kind in ("model", "attention") or first.shape[along] != whole:
            raise StateError(
                "spans of a packed row need a module that works token by token",
                where=self.path,
                got=f"{whole} tokens, input of shape {tuple(first.shape)}",
            )
        outs = []
        for (start, _, names), length in zip(routing.spans, routing.lengths, strict=True):
            cut = [one.narrow(along, start, length) for one in args]
            with self.adapters.running(Routing.everywhere(names)):
                outs.append(self._stacked(names)(*cut, **kwargs))
        return torch.cat(outs, along)

    # Merging ---------------------------------------------------------------------------------------------------

    def merged(self, names: Active, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Those of the module's own parameters that change when the named layers are folded in.

        Rounded once: to each parameter's own dtype, or to the one given.
        """
        stored = {name: self.frozen.value(name).detach() for name in parameters_of(self.module)}
        changed: dict[str, Tensor] = {}
        for layer in self.standing(names):
            if layer.innermost:
                changed |= layer.merged(stored | changed, stored)
            else:
                changed |= self._oriented(layer.merged(self._oriented(stored | changed), self._oriented(stored)))
        return {name: value.to(dtype or stored[name].dtype) for name, value in changed.items()}

    def _oriented(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A Conv1D stores its weight as (in, out), an embedding too; this turns it round, there and back."""
        turned = dict(parameters)
        if self.shape.kind in ("conv1d", "embedding") and "weight" in turned:
            turned["weight"] = turned["weight"].T
        return turned

    def stored(self, name: str) -> Tensor | None:
        """One of the module's own parameters; None for a weight that codes stand for."""
        place, last = owner(self.module, name)
        return place[last]

    def store(self, name: str, value: Tensor | None) -> None:
        """Write one of the module's own parameters. A dense weight stands in for codes until None takes it away."""
        place, last = owner(self.module, name)
        if value is not None and place[last] is not None:
            place[last].detach().copy_(value)
        else:
            place[last] = None if value is None else nn.Parameter(value, requires_grad=False)

    def exchange(self, name: str, value: Tensor) -> Tensor | None:
        """Store a value; what stood there before comes back in the memory that the value had."""
        stored = self.stored(name)
        if stored is None:
            self.store(name, value)
            return None
        trained = (slot for layer in self.layers.values() for slot in (*layer.parameters(), *layer.buffers()))
        if value.untyped_storage().data_ptr() in {slot.untyped_storage().data_ptr() for slot in trained}:
            value = value.clone()  # what was trained whole stays what it is
        _swap(stored.detach(), value)
        return value

    def forget_codes(self) -> None:
        """Let a dense weight that stands in for codes be there for good."""
        if isinstance(self.module, QuantizedLinear) and self.stored("weight") is not None:
            self.module.forget_codes()


def _swap(one: Tensor, other: Tensor) -> None:
    """Exchange what two tensors hold, a piece that fits a cache at a time: new memory would cost more than the copy."""
    rows = max(1, (1 << 18) * len(one) // max(1, one.numel())) if one.ndim else 1
    pieces = zip(one.split(rows), other.split(rows), strict=True) if one.ndim else [(one, other)]
    for here, there in pieces:
        before = here.clone()
        here.copy_(there)
        there.copy_(before)


def _picked(values: Any, index: Tensor, whole: int) -> Any:
    """Arguments of a call with only some entries of every tensor whose first dimension is the batch's."""
    if isinstance(values, Tensor):
        return values[index] if values.ndim and values.shape[0] == whole else values
    if isinstance(values, dict):
        return {name: _picked(value, index, whole) for name, value in values.items()}
    return type(values)(_picked(value, index, whole) for value in values) if type(values) in (tuple, list) else values


def _joined(outs: Sequence[Any], order: Tensor, where: str) -> Any:
    """Outputs of parts of a batch as the output of the whole, in the order of its rows."""
    first = outs[0]
    if len(outs) == 1:
        return first
    if isinstance(first, Tensor):
        if not first.ndim:
            raise StateError(
                "one number for the whole batch cannot be put together from rows with different adapters",
                where=where,
                hint="leave the labels out and compute the loss from the logits",
            )
        return torch.cat([*outs])[order]
    if isinstance(first, dict):  # a transformers output is one
        return type(first)(**{name: _joined([out[name] for out in outs], order, where) for name in first})
    if type(first) in (tuple, list):
        return type(first)(_joined(parts, order, where) for parts in zip(*outs, strict=True))
    return None  # a key-value cache, for example: it cannot be told apart by rows
