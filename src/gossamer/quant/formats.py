"""What a quantised weight is made of: codes, scales, and the tables that turn codes back into numbers.

    W[i] ~ code[q[i]] * absmax[block of i]                                    4 bits: 16 codes, blocks of 64
    absmax[b] ~ dynamic[a[b]] * absmax2[block of b] + offset                   double quantisation: blocks of 256
    W[o, i] ~ q[o, i] * absmax[o] / 127                                       int8, one scale a row

Bits a weight: 4 + 32 / 64 = 4.5; with double quantisation 4 + 8 / 64 + 32 / (64 * 256) = 4.127; int8 8 + 32 / in.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; int8: Dettmers et al. 2022, arXiv:2208.07339, section 2.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share a scale."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own."""


@dataclass(frozen=True)
class QuantFormat:
    """How weights are stored. `table`: "nf4", "fp4" or "int8"; `double`: whether the scales are quantised again."""

    table: str
    double: bool


FORMATS = {
    **{f"{table}{end}": QuantFormat(table, not end) for table in ("nf4", "fp4") for end in ("", "-single")},
    "int8": QuantFormat("int8", False),
}
"""What `quant` may be, and what it means."""

# Quantiles of the normal distribution, scaled to [-1, 1], with a zero: appendix E of the QLoRA paper.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# One sign, two exponent and one mantissa bit, in units of 1/12; the code is the bit pattern.
_FP4 = tuple(sign * unit / 12 for sign in (1, -1) for unit in (0, 0.0625, 8, 12, 4, 6, 2, 3))


@functools.cache
def table(name: str, device: torch.device) -> Tensor:
    """Code -> number, float32 (16,), of "nf4" or "fp4"."""
    return torch.tensor({"nf4": _NF4, "fp4": _FP4}[name], dtype=torch.float32, device=device)


@functools.cache
def dynamic_table(device: torch.device) -> Tensor:
    """The signed 8-bit "dynamic" code, float32 (256,), ascending: seven decades, each of twice the last one's points.

    Source: Dettmers 2015, arXiv:1511.04561, section 2; Dettmers et al. 2021, arXiv:2110.02861.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        positive = ((10 ** (decade - 6)) * means).tolist()
        values += [*positive, *(-value for value in positive)]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Packed:
    """A quantised matrix.

    Attributes:
        table: "nf4", "fp4" or "int8".
        shape: (out, in) of the weight.
        codes: uint8 (out * in / 2, 1), two codes a byte and the first in the high half; int8 (out, in).
        absmax: float32 (blocks,), or uint8 when it is quantised again; of int8 float32 (out,).
        nested_absmax, offset: float32 (blocks / 256,) and (), of scales that are quantised again.
    """

    table: str
    shape: tuple[int, int]
    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def packed_bytes(form: QuantFormat, out_features: int, in_features: int) -> int:
    """What `Packed.nbytes` will be."""
    count = out_features * in_features
    if form.table == "int8":
        return count + 4 * out_features
    blocks = -(-count // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if form.double else 4 * blocks
    return -(-count // 2) + scales
