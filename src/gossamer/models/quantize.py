"""A base model, quantised and written as a folder of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gossamer.attachment.walk import modules
from gossamer.errors import StateError
from gossamer.models.load import load_base
from gossamer.models.write import write_model_folder
from gossamer.quant import QuantizedLinear


def quantize_base(
    base: str | Path, output: str | Path, *, quant: str = "nf4", dtype: str = "auto", device: str = "auto"
) -> dict[str, Any]:
    """Quantise a base, weight by weight as it is read, and write a folder: whole or not at all.

    The folder loads with `load_base`, and with plain transformers where bitsandbytes is installed.

    Args:
        base: catalog name, Hugging Face id, folder or .gguf file.
        output: a folder that does not exist yet.
        quant: see `load_base`.
        dtype: what weights are rebuilt in, and what those that stay dense are stored as.

    Returns:
        {"output", "quant", "dtype", "modules", "parameters", "bytes", "bits", "seconds"}: of the quantised weights
        alone, `bits` being how many each parameter takes.

    Raises: StateError when output exists; what `load_base` raises; DiskError.
    """
    output = Path(output)
    if output.exists():
        raise StateError("the output folder exists already", where=str(output), hint="choose a new folder")
    start = time.monotonic()
    model, tokenizer = load_base(base, dtype=dtype, device=device, quant=quant)
    packed = [module for module in modules(model).values() if isinstance(module, QuantizedLinear)]
    count = sum(module.in_features * module.out_features for module in packed)
    nbytes = sum(module.packed.nbytes for module in packed)
    write_model_folder(model, tokenizer, output)
    return {
        "output": str(output),
        "quant": quant,
        "dtype": str(model.dtype).removeprefix("torch."),
        "modules": len(packed),
        "parameters": count,
        "bytes": nbytes,
        "bits": 8 * nbytes / count,
        "seconds": time.monotonic() - start,
    }
