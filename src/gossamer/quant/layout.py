"""Quantised weights as a file has them: bitsandbytes' names and layout, so that transformers reads them too."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensors as lists have no types)

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import BaseFileError
from gossamer.quant.formats import BLOCK, NESTED_BLOCK, Packed, dynamic_table, table


def serialized(packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file, by bitsandbytes' names."""
    if packed.table == "int8":
        return {"weight": packed.codes, "SCB": packed.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    device = packed.codes.device
    state: dict[str, Any] = {"quant_type": packed.table, "blocksize": BLOCK, "dtype": _name(dtype)}
    state["shape"] = [*packed.shape]
    tensors = {"weight": packed.codes, "weight.absmax": packed.absmax, "weight.quant_map": table(packed.table, device)}
    if packed.nested_absmax is not None and packed.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": packed.offset.item()}
        tensors["weight.nested_absmax"] = packed.nested_absmax
        tensors["weight.nested_quant_map"] = dynamic_table(device).clone()
    words = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
    return tensors | {"weight.quant_map": tensors["weight.quant_map"].clone(), f"weight.{_state(packed.table)}": words}


def deserialized(tensors: Mapping[str, Tensor], where: str, shape: tuple[int, int]) -> Packed:
    """The packed weight among a module's tensors.

    Raises: BaseFileError for parts that are missing, of another size than the module's, scales that are not finite, or
        a layout that is not bitsandbytes' with blocks of 64 (and of 256 for the scales).
    """
    if "weight" not in tensors:
        raise BaseFileError("a quantised weight without its codes", where=where, got=str(sorted(tensors)))
    if "SCB" in tensors:
        packed = Packed("int8", shape, tensors["weight"], tensors["SCB"].float().reshape(-1))
        _check(packed, where)
        return packed
    name = next((one for one in ("nf4", "fp4") if f"weight.{_state(one)}" in tensors), None)
    if name is None:
        raise BaseFileError("a quantised weight without its quantisation state", where=where, got=str(sorted(tensors)))
    state = _read_state(tensors[f"weight.{_state(name)}"], where)
    expected = {"quant_type": name, "blocksize": BLOCK, "shape": [*shape]}
    nested = tensors.get("weight.nested_absmax")
    if nested is not None:
        expected["nested_blocksize"] = NESTED_BLOCK
    got = {key: state.get(key) for key in expected}
    _check_tables(tensors, name, where)
    if got != expected or "weight.absmax" not in tensors:
        raise BaseFileError(
            "a layout of quantised weights that is not read", where=where, got=str(got), expected=str(expected)
        )
    codes, absmax = tensors["weight"].view(torch.uint8).reshape(-1, 1), tensors["weight.absmax"].reshape(-1)
    offset = None
    if nested is not None:
        nested, offset = nested.reshape(-1), torch.tensor(_offset(state, where), device=codes.device)
    packed = Packed(name, shape, codes, absmax, nested, offset)
    _check(packed, where)
    return packed


def _check_tables(tensors: Mapping[str, Tensor], name: str, where: str) -> None:
    """Raise `BaseFileError` when the file's own tables are other codes than those of its format."""
    device = tensors["weight"].device
    for part, expected in (("quant_map", table(name, device)), ("nested_quant_map", dynamic_table(device))):
        stored = tensors.get(f"weight.{part}")
        if stored is not None and not torch.equal(stored.float(), expected):
            raise BaseFileError(f"a table of codes that is not the one of {name}", where=f"{where}.weight.{part}")


def _offset(state: Mapping[str, Any], where: str) -> float:
    """What was taken from the scales before they were quantised: any other number gives other weights."""
    offset = state.get("nested_offset")
    if not isinstance(offset, float):
        got = repr(offset)[:80]
        raise BaseFileError("quantised scales without their offset", where=where, got=got, expected="a float")
    return offset


def _check(packed: Packed, where: str) -> None:
    """Raise `BaseFileError` unless every part has the size and type that the shape asks for, and scales are finite."""
    outer, inner = packed.shape
    blocks = -(-outer * inner // BLOCK)
    if packed.table == "int8":
        expected = {"codes": ((outer, inner), torch.int8), "absmax": ((outer,), torch.float32)}
    else:
        scales = ((blocks,), torch.float32 if packed.nested_absmax is None else torch.uint8)
        expected = {"codes": ((-(-outer * inner // 2), 1), torch.uint8), "absmax": scales}
    if packed.nested_absmax is not None:
        expected["nested_absmax"] = ((-(-blocks // NESTED_BLOCK),), torch.float32)
    got = {name: (tuple(getattr(packed, name).shape), getattr(packed, name).dtype) for name in expected}
    if got != expected:
        raise BaseFileError(
            "parts of a quantised weight that do not fit it", where=where, got=str(got), expected=str(expected)
        )
    for name in ("absmax", "nested_absmax", "offset"):
        part = getattr(packed, name)
        if part is not None and not part.isfinite().all():
            raise BaseFileError("scales of a quantised weight that are not finite", where=where, got=name)


def _read_state(words: Tensor, where: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(words.cpu().to(torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:
        raise BaseFileError("a quantisation state that is not JSON", where=where, got=str(error)) from None
    if not isinstance(state, dict):
        raise BaseFileError("a quantisation state that is no mapping", where=where, got=type(state).__name__)
    return state


def _state(name: str) -> str:
    return f"quant_state.bitsandbytes__{name}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
