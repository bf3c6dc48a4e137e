"""Frozen linear maps on a CPU when few rows pass: laid out once as oneDNN reads them, or turned round for BLAS.

    y = x W^T + b          x (N, in), N from the one row of a decoding step to the tokens of a prompt

The plain twin is the module itself.
"""

# pyright: reportUnnecessaryComparison=false
# (torch types the bias of a linear module as if there always were one)

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Outs(NamedTuple):
    """What maps make of one input.

    Attributes:
        each: (N, out_i) of each map. whole: (N, sum of out_i), of which they are columns, if they are.
    """

    each: Sequence[Tensor]
    whole: Tensor | None = None


Maps = Callable[[Tensor], Outs]

FEW = range(2, 65)
"""Rows of which BLAS makes the product faster when it is turned round, in float32."""
_ROWS = 32
"""For which oneDNN chooses a layout."""


def turned_round(module: nn.Module, x: Tensor) -> Tensor:
    """What a frozen map makes of x (N, in).

    `(W x^T)^T` in float32 takes half to nine tenths of the time of `x W^T` for few rows: BLAS cuts W into pieces for
    its threads, where it would cut the rows.
    """
    if type(module) is nn.Linear and len(x) in FEW and x.device.type == "cpu" and x.dtype == torch.float32:
        out = torch.mm(module.weight, x.T).T.contiguous()
        return out if module.bias is None else out.add_(module.bias)
    return module(x)


class Prepacked:
    """Maps of one input, their weights one below the other in oneDNN's own layout. That is a copy: later changes of the
    modules are not seen.

    Products by it take 0.4 to 0.9 of the time that plain ones take on CPUs with AVX-512, for any number of rows; one
    product instead of several saves what it takes to begin them.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.sizes = [len(one.weight) for one in modules]
        whole = torch.cat([one.weight.detach() for one in modules])
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(whole, _ROWS)
        biases = [whole.new_zeros(len(one.weight)) if one.bias is None else one.bias.detach() for one in modules]
        self.bias = None if all(one.bias is None for one in modules) else torch.cat(biases)

    def __call__(self, x: Tensor) -> Outs:
        """`x W^T + b` of x (N, in)."""
        whole = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return Outs(whole.split(self.sizes, -1), whole)


def can_prepack(module: nn.Module) -> bool:
    """Whether oneDNN is there and multiplies by this map: a plain one, on a CPU that computes in its dtype."""
    if type(module) is not nn.Linear or module.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if module.weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return module.weight.dtype == torch.float32


def prepacked_bytes(modules: Iterable[nn.Module]) -> int:
    """What the copies of those that can be prepacked take."""
    return sum(module.weight.nbytes for module in modules if isinstance(module, nn.Linear) and can_prepack(module))


def maps_of(modules: Sequence[nn.Module], prepack: bool) -> Maps:
    """The fastest way to multiply by frozen maps that read the same input, with a copy of their weights or without."""
    linear = [one for one in modules if isinstance(one, nn.Linear)]
    if prepack and len(linear) == len(modules) and all(map(can_prepack, modules)):
        return Prepacked(linear)
    return lambda x: Outs([turned_round(one, x) for one in modules])
