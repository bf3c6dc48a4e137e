"""A base model, quantised and written as a folder of its own."""

import time
import warnings
from pathlib import Path
from typing import Any

from gossamer.errors import StateError
from gossamer.models.load import load_base
from gossamer.models.stored import storage
from gossamer.models.write import write_model_folder


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
        {"output", "quant", "dtype", "modules", "parameters", "bytes", "bits", "model", "seconds"}: of the quantised
        weights alone, `bits` being how many each parameter takes. "model" says the same of the whole model:
        {"parameters", "bytes", "bits", "packed", "dense"}, with the share that is packed, and the numbers that are not
        by what they belong to.

    Raises: StateError when output exists; what `load_base` raises; DiskError.
    """
    output = Path(output)
    if output.exists():
        raise StateError("the output folder exists already", where=str(output), hint="choose a new folder")
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what stays dense is in the result
        model, tokenizer = load_base(base, dtype=dtype, device=device, quant=quant)
    stored = storage(model)
    write_model_folder(model, tokenizer, output)
    whole = {"parameters": stored.total, "bytes": stored.nbytes, "bits": stored.bits}
    return {
        "output": str(output),
        "quant": quant,
        "dtype": str(model.dtype).removeprefix("torch."),
        "modules": stored.modules,
        "parameters": stored.packed,
        "bytes": stored.packed_bytes,
        "bits": 8 * stored.packed_bytes / stored.packed,
        "model": whole | {"packed": stored.packed / stored.total, "dense": stored.dense},
        "seconds": time.monotonic() - start,
    }
