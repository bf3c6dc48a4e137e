"""diffusers: one safetensors file, `unet.<path>.lora_A.weight` and `.lora_B.weight`, ranks and alphas in its metadata.

Older files have an `.alpha` tensor a module instead; with neither, alpha is the rank.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.folder import json_object
from gossamer.files.foreign.factors import Factors
from gossamer.files.foreign.format import BaseFacts, ForeignFile, ForeignFormat, number_in

METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
LONGEST = 512
"""Characters of a pattern."""


def _decode(file: ForeignFile, base: BaseFacts | None) -> dict[str, Factors]:
    facts = json_object(file.facts[METADATA], f"{file.where}: {METADATA}") if METADATA in file.facts else {}
    found: dict[str, Factors] = {}
    for name, (down, up) in file.pairs.items():
        if name.partition(".")[0] not in COMPONENTS:
            raise AdapterFileError("no module of a pipeline", where=f"{file.where}: {name}", expected=str(COMPONENTS))
        alpha = file.alphas[name] if name in file.alphas else _alpha(facts, name, down.shape[0])
        found[name] = Factors(down, up, alpha)
    return found


def _encode(factors: Mapping[str, Factors], base: BaseFacts | None) -> ForeignFile:
    facts: dict[str, Any] = {}
    for part in dict.fromkeys(component_of(name) for name in factors):
        inside = {name.partition(".")[2]: one for name, one in factors.items() if component_of(name) == part}
        first = next(iter(inside.values()))
        facts[f"{part}.r"], facts[f"{part}.lora_alpha"] = first.rank, first.alpha
        facts[f"{part}.target_modules"] = [*inside]
        ranks = {f"^{re.escape(name)}": one.rank for name, one in inside.items() if one.rank != first.rank}
        alphas = {f"^{re.escape(name)}": one.alpha for name, one in inside.items() if one.alpha != first.alpha}
        facts[f"{part}.rank_pattern"], facts[f"{part}.alpha_pattern"] = ranks, alphas
    pairs = {name: (one.down, one.up) for name, one in factors.items()}
    return ForeignFile(pairs, facts={METADATA: json.dumps(facts, sort_keys=True)})


def component_of(name: str) -> str:
    """The pipeline's part that a path begins with. Raises `UnsupportedError`."""
    part = name.partition(".")[0]
    if part not in COMPONENTS:
        raise UnsupportedError("not a module of a pipeline", where=name, expected=f"a path below {COMPONENTS}")
    return part


def _alpha(facts: Mapping[str, Any], name: str, rank: int) -> float:
    part, _, path = name.partition(".")
    if f"{part}.lora_alpha" not in facts:
        return float(rank)
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


DIFFUSERS = ForeignFormat(
    "diffusers",
    (".lora_A.weight", ".lora_B.weight"),
    _decode,
    _encode,
    alphas=True,
    starts=tuple(f"{part}." for part in COMPONENTS),
)
