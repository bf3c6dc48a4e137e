"""What storing a merged weight in fewer bits takes from it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gossamer.quant import FORMATS, dequantize, quantize

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def losses(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Errors of every way to store merged weights.

        of_weight = |C(W') - W'| / |W'|        of_change = |C(W') - W'| / |W' - W|

    Norms are Frobenius norms over all the modules together, C is rounding or quantising and back.

    Args:
        pairs: of each module W and W', (out, in), float32; one after the other, so that one pair is alive at a time.

    Returns: storage -> {"of_weight", "of_change"}; nothing where there are no pairs.
    """
    lost: dict[str, float] = {}
    weight = change = 0.0
    for before, after in pairs:
        weight += _square(after)
        change += _square(after - before)
        for name in (*_DTYPES, *FORMATS):
            lost[name] = lost.get(name, 0.0) + _square(_stored(after, name) - after)
    return {
        name: {"of_weight": (total / weight) ** 0.5 if weight else 0.0, "of_change": _over(total, change)}
        for name, total in lost.items()
    }


def _stored(weight: Tensor, name: str) -> Tensor:
    """A weight as it is after it was stored so."""
    if name in _DTYPES:
        return weight.to(_DTYPES[name]).to(weight.dtype)
    return dequantize(quantize(weight, FORMATS[name]), weight.dtype)


def _over(total: float, change: float) -> float:
    return (total / change) ** 0.5 if change else float(total > 0)


def _square(matrix: Tensor) -> float:
    return matrix.double().square().sum().item()
