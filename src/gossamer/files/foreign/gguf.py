"""GGUF: a LoRA file that llama.cpp and Ollama put beside a base's GGUF.

    general.type = adapter, adapter.type = lora, adapter.lora.alpha        one alpha for all modules
    blk.0.attn_q.weight.lora_a (rank, in), .lora_b (out, rank)

llama.cpp divides alpha by each module's own rank, and takes an alpha of 0 for none, that is one equal to the rank. Its
Llama and Granite hold query and key rows in pairs, so those rows of lora_b are reordered; the numbers of heads that
this takes are in the file too.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.adapter import tensor_bytes
from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.families import FAMILIES, Family
from gossamer.files.atomic import write_bytes
from gossamer.files.foreign.factors import Factors, with_one_alpha
from gossamer.files.foreign.format import BaseFacts, ForeignFile, ForeignFormat, needed, only_matrices, rotated

_WRITTEN = {name: one for name, one in FAMILIES.items() if one.gguf}
"""Model type -> family; llama.cpp's converter says which rows change places."""
_KNOWN = {one.gguf: one for one in _WRITTEN.values()}
LARGEST = 1 << 34
"""Bytes of a file that may still be an adapter."""
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _decode(file: ForeignFile, base: BaseFacts | None) -> dict[str, Factors]:
    fields, where = file.facts, file.where
    kind = (fields.get("general.type"), fields.get("adapter.type"))
    if kind != ("adapter", "lora"):
        raise UnsupportedError("not a LoRA adapter", where=where, got=str(kind), expected="adapter, lora")
    named, alpha = fields.get("general.architecture"), fields.get("adapter.lora.alpha")
    if not isinstance(named, str) or named not in _KNOWN:
        raise UnsupportedError("an architecture that is not covered", where=where, got=repr(named))
    if not isinstance(alpha, float):
        raise AdapterFileError("no adapter.lora.alpha", where=where, got=repr(alpha), expected="a number")
    family = _KNOWN[named]
    heads = (fields.get(f"{named}.attention.head_count", 0), fields.get(f"{named}.attention.head_count_kv", 0))
    if family.gguf_pairs and not all(isinstance(number, int) and number > 0 for number in heads):
        base = needed(base, "gguf", "its heads say how query and key rows are ordered")
        heads = (base.heads, base.kv_heads)
    found: dict[str, Factors] = {}
    for name, (down, up) in file.pairs.items():
        module = _paths(family, name).get(name)
        if module is None:
            raise AdapterFileError("a module that is not covered", where=f"{where}: {name}")
        up = rotated(up, module, heads, back=True) if family.gguf_pairs else up
        found[module] = Factors(down, up, alpha or down.shape[0])
    return found


def _encode(factors: Mapping[str, Factors], base: BaseFacts | None) -> ForeignFile:
    base = needed(base, "gguf", "the file names its architecture and numbers of heads")
    if base.model_type not in _WRITTEN:
        what = "an architecture that is not covered"
        raise UnsupportedError(what, got=base.model_type, expected=", ".join(_WRITTEN))
    only_matrices(factors, "gguf")
    factors, alpha, lost = with_one_alpha(factors, per_rank=False)
    if not alpha:
        raise UnsupportedError("llama.cpp takes an alpha of 0 for none, and would not scale at all", got="alpha=0")
    family, heads = _WRITTEN[base.model_type], (base.heads, base.kv_heads)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module, one in factors.items():
        names = {path: name for name, path in _paths(family, module).items()}
        if module not in names:
            what = "a module that is not covered"
            raise UnsupportedError(what, where=module, expected=", ".join(family.gguf_modules))
        for factor in (one.down, one.up):
            if factor.dtype not in _DTYPES:
                raise UnsupportedError("a dtype that GGUF adapters have not", where=module, got=str(factor.dtype))
        pairs[names[module]] = (one.down, rotated(one.up, module, heads) if family.gguf_pairs else one.up)
    if float(np.float32(alpha)) != alpha:
        lost.append("the last digits of alpha (float32 in the file)")
    facts = {"architecture": family.gguf, "alpha": alpha, "heads": heads}
    return ForeignFile(pairs, facts=facts, lost=tuple(lost))


def _paths(family: Family, place: str) -> dict[str, str]:
    """llama.cpp's name -> module path, of the layer whose number stands in `place`."""
    import gguf

    number = re.match(r"(?:blk|model\.layers)\.(\d{1,4})\.", place)
    if number is None:
        return {}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[family.gguf], int(number[1]) + 1)
    paths = [f"model.layers.{number[1]}.{module}" for module in family.gguf_modules]
    return {name: path for path in paths if (name := names.get_name(path)) is not None}


def _write(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    import gguf

    with tempfile.TemporaryDirectory() as scratch:  # the package writes to a path, and not atomically
        writer = gguf.GGUFWriter(Path(scratch, "adapter"), facts["architecture"])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", facts["alpha"])
        writer.add_head_count(facts["heads"][0])
        writer.add_head_count_kv(facts["heads"][1])
        for name, tensor in tensors.items():
            _add(writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_bytes(path, Path(scratch, "adapter").read_bytes())


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    import gguf

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        raw = np.frombuffer(tensor_bytes(plain), dtype=np.uint8).reshape(plain.shape[0], -1)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, plain.numpy())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The numbers and strings of a GGUF file, and its tensors. Raises `AdapterFileError`."""
    import gguf

    if not path.is_file() or path.stat().st_size > LARGEST:
        raise AdapterFileError("no such file, or one too large for an adapter", where=str(path))
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: _tensor(tensor, path) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise AdapterFileError("not a whole GGUF file", where=str(path), got=str(error)) from None
    return fields, tensors


def _tensor(tensor: Any, path: Path) -> Tensor:
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    dtype = dtypes.get(tensor.tensor_type.name)
    if dtype is None:
        raise UnsupportedError("a quantised factor", where=f"{path}: {tensor.name}", got=tensor.tensor_type.name)
    shape = [int(size) for size in reversed(tensor.shape)]
    return torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=dtype).reshape(shape)


GGUF = ForeignFormat(
    "gguf", (".weight.lora_a", ".weight.lora_b"), _decode, _encode, suffix=".gguf", read=_read, write=_write
)
