"""diffusers: one safetensors file, `unet.<path>.lora_A.weight` and `.lora_B.weight`, ranks and alphas in its metadata.

Older files have an `.alpha` tensor a module instead; with neither, alpha is the rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.foreign.changes import Change, Changes
from gossamer.files.foreign.format import (
    Base,
    Format,
    json_object,
    number_in,
    paired,
    read_safetensors,
    refuse_rest,
    write_safetensors,
)

METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
ENDINGS = (".lora_A.weight", ".lora_B.weight")
LONGEST = 512
"""Characters of a pattern."""


class Diffusers(Format):
    """diffusers' own layout of a pipeline's adapters."""

    name = "diffusers"
    reader = "diffusers"

    def detects(self, path: Path) -> bool:
        """See `Format`."""
        return path.is_file() and path.suffix == ".safetensors" and any(map(_is_theirs, read_safetensors(path)[0]))

    def read(self, path: Path, base: Base | None) -> Changes:
        """See `Format`."""
        tensors, metadata = read_safetensors(path)
        pairs, rest = paired(tensors, ENDINGS, path)
        alphas = {name.removesuffix(".alpha"): rest.pop(name) for name in [*rest] if name.endswith(".alpha")}
        refuse_rest(rest, path, self.name)
        facts = json_object(metadata[METADATA], f"{path}: {METADATA}") if METADATA in metadata else {}
        for name in [*pairs, *alphas]:
            if name.partition(".")[0] not in COMPONENTS or name not in pairs:
                raise AdapterFileError("no module of a pipeline", where=f"{path}: {name}", expected=str(COMPONENTS))
        return {
            name: Change(down, up, alpha_in(alphas[name], path, name) if name in alphas else _alpha(facts, name, down))
            for name, (down, up) in pairs.items()
        }

    def write(self, changes: Changes, path: Path, base: Base | None) -> list[str]:
        """See `Format`."""
        facts: dict[str, Any] = {}
        for part in dict.fromkeys(component_of(name) for name in changes):
            inside = {name.partition(".")[2]: one for name, one in changes.items() if component_of(name) == part}
            first = next(iter(inside.values()))
            facts[f"{part}.r"], facts[f"{part}.lora_alpha"] = first.rank, first.alpha
            facts[f"{part}.target_modules"] = [*inside]
            facts[f"{part}.rank_pattern"] = {
                f"^{re.escape(name)}": one.rank for name, one in inside.items() if one.rank != first.rank
            }
            facts[f"{part}.alpha_pattern"] = {
                f"^{re.escape(name)}": one.alpha for name, one in inside.items() if one.alpha != first.alpha
            }
        tensors = {name + end: factor for name, one in changes.items() for end, factor in _factors(one)}
        write_safetensors(path, tensors, {"format": "pt", METADATA: json.dumps(facts, sort_keys=True)})
        return []


def component_of(name: str) -> str:
    """The pipeline's part that a path begins with. Raises `UnsupportedError`."""
    part = name.partition(".")[0]
    if part not in COMPONENTS:
        raise UnsupportedError("not a module of a pipeline", where=name, expected=f"a path below {COMPONENTS}")
    return part


def alpha_in(tensor: Tensor, source: Path, name: str) -> float:
    """The number in an `.alpha` tensor. Raises `AdapterFileError`."""
    if tensor.numel() != 1:
        raise AdapterFileError("an alpha that is not one number", where=f"{source}: {name}", got=str(tensor.shape))
    return float(tensor.item())


def _factors(change: Change) -> tuple[tuple[str, Tensor], ...]:
    return (ENDINGS[0], change.down), (ENDINGS[1], change.up)


def _is_theirs(name: str) -> bool:
    return name.startswith(tuple(f"{part}." for part in COMPONENTS)) and name.endswith(ENDINGS)


def _alpha(facts: Mapping[str, Any], name: str, down: Tensor) -> float:
    part, _, path = name.partition(".")
    if f"{part}.lora_alpha" not in facts:
        return float(down.shape[0])
    if facts.get(f"{part}.use_rslora") or facts.get(f"{part}.use_dora"):
        raise UnsupportedError("only plain LoRA is covered", where=f"{METADATA}: {part}")
    patterns = facts.get(f"{part}.alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterFileError("not a JSON object", where=f"{METADATA}: {part}.alpha_pattern")
    for pattern in patterns:
        if _names(pattern, path):
            return number_in(patterns, pattern, METADATA)
    return number_in(facts, f"{part}.lora_alpha", METADATA)


def _names(pattern: str, path: str) -> bool:
    """Whether a pattern is the path or its end. It comes from a stranger, so it is never run as an expression."""
    plain = re.sub(r"\\([^A-Za-z0-9])", r"\1", pattern.removeprefix("^"))
    if len(pattern) > LONGEST or not re.fullmatch(r"[\w.-]+", plain):
        raise UnsupportedError("only names stand in an alpha_pattern", where=METADATA, got=pattern[:200])
    return path == plain or (not pattern.startswith("^") and path.endswith(f".{plain}"))
