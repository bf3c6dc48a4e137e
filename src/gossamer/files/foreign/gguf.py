"""GGUF: a LoRA file that llama.cpp and Ollama put beside a base's GGUF.

    general.type = adapter, adapter.type = lora, adapter.lora.alpha        one alpha for all modules
    blk.0.attn_q.weight.lora_a (rank, in), .lora_b (out, rank)

llama.cpp divides alpha by each module's own rank, and takes an alpha of 0 for none, that is one equal to the rank. Its
Llama and Granite hold query and key rows in pairs, so those rows of lora_b are reordered; the numbers of heads that
this takes are in the file too.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.adapter import tensor_bytes
from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.families import FAMILIES, Family
from gossamer.files.atomic import write_bytes
from gossamer.files.foreign.changes import Change, Changes, only_matrices, with_one_alpha
from gossamer.files.foreign.format import Base, Format, needed, paired, refuse_rest, rotated

_WRITTEN = {name: one for name, one in FAMILIES.items() if one.gguf}
"""Model type -> family; llama.cpp's converter says which rows change places."""
_KNOWN = {one.gguf: one for one in _WRITTEN.values()}
ENDINGS = (".weight.lora_a", ".weight.lora_b")
LARGEST = 1 << 34
"""Bytes of a file that may still be an adapter."""
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class GGUF(Format):
    """A LoRA GGUF."""

    name = "gguf"
    reader = "llama.cpp, Ollama"

    def detects(self, path: Path) -> bool:
        """See `Format`."""
        return path.is_file() and path.suffix == ".gguf"

    def read(self, path: Path, base: Base | None) -> Changes:
        """See `Format`."""
        fields, tensors = _contents(path)
        kind = (fields.get("general.type"), fields.get("adapter.type"))
        if kind != ("adapter", "lora"):
            raise UnsupportedError("not a LoRA adapter", where=str(path), got=str(kind), expected="adapter, lora")
        named, alpha = fields.get("general.architecture"), fields.get("adapter.lora.alpha")
        if not isinstance(named, str) or named not in _KNOWN:
            raise UnsupportedError("an architecture that is not covered", where=str(path), got=repr(named))
        family = _KNOWN[named]
        if not isinstance(alpha, float):
            raise AdapterFileError("no adapter.lora.alpha", where=str(path), got=repr(alpha), expected="a number")
        heads = tuple(fields.get(f"{named}.attention.{key}", 0) for key in ("head_count", "head_count_kv"))
        if family.gguf_pairs and not all(isinstance(number, int) and number > 0 for number in heads):
            base = needed(base, self.name, "its heads say how query and key rows are ordered")
            heads = (base.heads, base.kv_heads)
        pairs, rest = paired(tensors, ENDINGS, path)
        refuse_rest(rest, path, self.name)
        found: Changes = {}
        for name, (down, up) in pairs.items():
            module = _paths(family, name).get(name)
            if module is None:
                raise AdapterFileError("a module that is not covered", where=f"{path}: {name}")
            found[module] = Change(down, _turned(up, module, family, heads, back=True), alpha or down.shape[0])
        return found

    def write(self, changes: Changes, path: Path, base: Base | None) -> list[str]:
        """See `Format`."""
        import gguf

        base = needed(base, self.name, "the file names its architecture and numbers of heads")
        if base.model_type not in _WRITTEN:
            raise UnsupportedError(
                "an architecture that is not covered", got=base.model_type, expected=", ".join(_WRITTEN)
            )
        only_matrices(changes, self.name)
        changes, alpha, lost = with_one_alpha(changes, per_rank=False)
        if not alpha:
            raise UnsupportedError("llama.cpp takes an alpha of 0 for none, and would not scale at all", got="alpha=0")
        family = _WRITTEN[base.model_type]
        tensors = _named(changes, family, (base.heads, base.kv_heads))
        if float(np.float32(alpha)) != alpha:
            lost.append("the last digits of alpha (float32 in the file)")
        with tempfile.TemporaryDirectory() as scratch:  # the package writes to a path, and not atomically
            writer = gguf.GGUFWriter(Path(scratch, "adapter"), family.gguf)
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            writer.add_head_count(base.heads)
            writer.add_head_count_kv(base.kv_heads)
            for name, tensor in tensors.items():
                _add(writer, name, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            write_bytes(path, Path(scratch, "adapter").read_bytes())
        return lost


def _named(changes: Changes, family: Family, heads: tuple[int, int]) -> dict[str, Tensor]:
    tensors = {}
    for module, one in changes.items():
        names = {path: name for name, path in _paths(family, module).items()}
        if module not in names:
            raise UnsupportedError(
                "a module that is not covered", where=module, expected=", ".join(family.gguf_modules)
            )
        for factor in (one.down, one.up):
            if factor.dtype not in _DTYPES:
                raise UnsupportedError("a dtype that GGUF adapters have not", where=module, got=str(factor.dtype))
        tensors[names[module] + ENDINGS[0]] = one.down
        tensors[names[module] + ENDINGS[1]] = _turned(one.up, module, family, heads)
    return tensors


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


def _turned(up: Tensor, module: str, family: Family, heads: tuple[int, ...], back: bool = False) -> Tensor:
    if not family.gguf_pairs or not module.endswith(("q_proj", "k_proj")):
        return up
    return rotated(up, heads[0] if module.endswith("q_proj") else heads[1], back)


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    import gguf

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        raw = np.frombuffer(tensor_bytes(plain), dtype=np.uint8).reshape(plain.shape[0], -1)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, plain.numpy())


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
