"""The one door to what does the work: bitsandbytes where it is installed, else the reference, equal bit for bit."""

import functools
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from gossamer.quant import reference
from gossamer.quant.formats import BLOCK, NESTED_BLOCK, Packed, QuantFormat, dynamic_table, table

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def bitsandbytes() -> Any:
    """The module, or None where it is not installed. It is kept from downloading kernels while it is imported."""
    before = {name: sys.modules[name] for name in ("kernels",) if name in sys.modules}  # transformers may have it
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]  # Python's way to make an import fail
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError):
        return None
    finally:
        del sys.modules["kernels"]
        sys.modules.update(before)


def quantize(weight: Tensor, form: QuantFormat) -> Packed:
    """A matrix (out, in) in 4 or 8 bits. Raises nothing: NaN and infinity are the caller's to refuse.

    Cost: bitsandbytes' own on CUDA; everywhere else the reference's, a few passes over the weight.
    """
    library = bitsandbytes() if weight.device.type == "cuda" and form.table != "int8" else None
    if library is None or weight.dtype not in _FLOATS:
        return reference.quantize(weight, form)
    codes, state = library.functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=form.table, compress_statistics=form.double
    )
    nested = state.state2.absmax if form.double else None
    outer, inner = weight.shape
    return Packed(form.table, (outer, inner), codes, state.absmax, nested, state.offset if form.double else None)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that the codes stand for, in `dtype`, rounded once. Keeps nothing.

    Where the CPU rounds to bfloat16 itself (AVX512_BF16), numbers below 1.2e-38 become zero.
    """
    library = bitsandbytes() if packed.table != "int8" and packed.codes.device.type in ("cpu", "cuda") else None
    count = packed.shape[0] * packed.shape[1]
    odd = count % 2 == 1  # for these it has no kernel, and compiles one for every shape it meets
    if library is None or odd or dtype not in _FLOATS:
        return reference.dequantize(packed, dtype)
    # Its AVX512 kernel begins a block with every row, which gives wrong numbers where a block spans two of them.
    shape = packed.shape if packed.shape[1] % BLOCK == 0 else (1, count)
    absmax, device = packed.absmax, packed.codes.device
    if packed.nested_absmax is not None:
        nested = library.functional.QuantState(
            absmax=packed.nested_absmax, blocksize=NESTED_BLOCK, code=dynamic_table(device), dtype=torch.float32
        )
        absmax = library.functional.dequantize_blockwise(absmax, nested) + packed.offset
    state = library.functional.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=table(packed.table, device),
        blocksize=BLOCK,
        quant_type=packed.table,
        dtype=dtype,
    )
    return library.functional.dequantize_4bit(packed.codes, state).view(packed.shape)
