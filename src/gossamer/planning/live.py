"""Which bytes of tensors are alive, followed through every operation, of real tensors or of fake ones alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.allclose.default)
"""Operations whose result depends on numbers, which a fake tensor does not have."""

_GROUPED = torch.ops.aten._grouped_mm.default
_ANY = (torch.ops.aten.any.default, torch.ops.aten.any.dim)


class LiveBytes(TorchDispatchMode):
    """While open, `now` is the bytes of all tensors known, and `peak` the most there has been.

    Storages are known by their identity and report their end, so views count once and nothing counts after its end.
    What a kernel allocates and frees inside one operation is not seen.

    Attributes:
        log: bytes that came (above 0) and went (below 0), in their order.
        answer: what a fake tensor says where the program asks for its numbers.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.answer = True
        self.log: list[int] = []
        self.born: dict[int, int] = {}
        for tensor in known:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it is freed; one of the meta device takes nothing."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.born and size:
            weakref.finalize(storage, self._freed, key, size)
            self.born[key] = len(self.log)
            self.log.append(size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self.born[key]
        self.log.append(-size)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED and any(isinstance(one, FakeTensor) for one in args):
            said = self.answer and not hasattr(args[0], "gossamer_any")  # nothing is wrong with any of them
            return said if func is not _ASKED[0] or args[0].dtype == torch.bool else int(said)
        if func is _GROUPED and isinstance(args[0], FakeTensor):
            out = _grouped(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        if func in _ANY and isinstance(out, FakeTensor):
            out.gossamer_any = True  # pyright: ignore[reportAttributeAccessIssue] (a note for the question that follows)
        return out


def _grouped(one: Tensor, other: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The result of a product for each of several experts: torch's own for fake tensors takes bfloat16 alone."""
    if one.dim() == other.dim() == 2:
        assert offs is not None, "two matrices are cut at offsets"
        return one.new_empty(len(offs), one.shape[0], other.shape[1])
    return one.new_empty(*one.shape[:-1] if other.dim() == 3 else one.shape[1:2], other.shape[-1])
