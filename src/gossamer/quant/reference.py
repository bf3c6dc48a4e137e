"""Quantising and back in plain torch: what the formats mean, bit for bit, and the way where bitsandbytes is absent."""

import torch
from torch import Tensor

from gossamer.quant.formats import BLOCK, NESTED_BLOCK, Packed, QuantFormat, dynamic_table, table

_SMALLEST = 1e-38  # a block of zeros is divided by this instead of by zero


def quantize(weight: Tensor, form: QuantFormat) -> Packed:
    """A matrix (out, in) in 4 or 8 bits; computed in float32.

    4 bits: each weight becomes the code nearest to `W / absmax` of its block. int8: `round(127 W / absmax)` of its row.
    Source: Dettmers et al. 2023, arXiv:2305.14314, equations 1 and 3.
    """
    outer, inner = weight.shape
    if form.table == "int8":
        absmax = weight.abs().amax(dim=1).float()
        codes = torch.round(weight * (127.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).to(torch.int8)
        return Packed("int8", (outer, inner), codes, absmax)
    codes, absmax = _four_bits(weight.reshape(-1).float(), form.table)
    if not form.double:
        return Packed(form.table, (outer, inner), codes, absmax)
    offset = absmax.mean()
    absmax, nested = _dynamic(absmax - offset)
    return Packed(form.table, (outer, inner), codes, absmax, nested, offset)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that the codes stand for: computed in float32, rounded once."""
    if packed.table == "int8":
        return (packed.codes * (packed.absmax / 127.0).unsqueeze(1)).to(dtype)
    absmax = scales(packed)
    pairs = _pairs(packed.table, packed.codes.device)
    numbers = pairs.index_select(0, packed.codes.reshape(-1).int()).reshape(-1)[: packed.shape[0] * packed.shape[1]]
    return _scaled(numbers, absmax, BLOCK).to(dtype).reshape(packed.shape)


def scales(packed: Packed) -> Tensor:
    """The scale of each block of a 4-bit matrix, float32 (blocks,)."""
    if packed.nested_absmax is None:
        return packed.absmax
    numbers = dynamic_table(packed.absmax.device)[packed.absmax.int()]
    assert packed.offset is not None
    return _scaled(numbers, packed.nested_absmax, NESTED_BLOCK) + packed.offset


def _four_bits(flat: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Two codes a byte (ceil(n / 2), 1), and the absolute maximum of each block of 64."""
    code = table(name, flat.device)
    ascending, order = code.sort(stable=True)
    scaled, absmax = _normalised(flat)
    scaled = torch.nn.functional.pad(scaled, (0, len(scaled) % 2))
    nearest = torch.bucketize(scaled, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    codes = order[nearest].to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def _normalised(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers over the largest magnitude of their block, within [-1, 1], and those magnitudes."""
    whole = len(flat) // BLOCK * BLOCK
    rows = flat[:whole].reshape(-1, BLOCK)
    absmax = rows.abs().amax(dim=1)
    scaled = (rows * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).clamp(-1, 1).reshape(-1)
    if whole < len(flat):  # the last block is short
        last = flat[whole:].abs().max().clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, (flat[whole:] / last).clamp(-1, 1)])
    return scaled, absmax


def _dynamic(flat: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit dynamic codes of numbers in blocks of 256, and the absolute maximum of each block.

    The code nearest to one of 65,536 even steps from -1 to 1: bitsandbytes looks codes up so on a CPU, and one scale in
    a thousand would be a step off if the nearest code were found exactly.
    """
    code = dynamic_table(flat.device)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = rows.abs().amax(dim=1)
    scaled = (rows * (1.0 / absmax).unsqueeze(1)).nan_to_num(-1.0)  # 0 / 0 is the first code, as in bitsandbytes
    steps = ((scaled.clamp(-1, 1) + 1.0) * 32767.5 + 0.5).int()
    place = steps / 32767.5 - 1.0
    upper = torch.bucketize(place, code).clamp(1, 255)  # code[upper - 1] < place <= code[upper]
    nearer = (code[upper] - place).abs() < (place - code[upper - 1]).abs()
    codes = torch.where(nearer, upper, upper - 1).to(torch.uint8)
    return codes.reshape(-1)[: len(flat)], absmax


def _scaled(numbers: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Numbers times the scale of their block."""
    whole = len(numbers) // block * block
    rows = (numbers[:whole].reshape(-1, block) * absmax[: whole // block].unsqueeze(1)).reshape(-1)
    return rows if whole == len(numbers) else torch.cat([rows, numbers[whole:] * absmax[-1]])


def _pairs(name: str, device: torch.device) -> Tensor:
    """Byte -> the two numbers it stands for, float32 (256, 2)."""
    code = table(name, device)
    byte = torch.arange(256, device=device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1)
