"""torchtune: `adapter_0.safetensors` under torchtune's own names, and `adapter_config.json` with rank and alpha.

Its Llama models hold query and key rows in pairs (Meta's order), so those rows of lora_b are reordered.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.families import FAMILIES
from gossamer.files.foreign.factors import Factors, with_one_alpha
from gossamer.files.foreign.format import (
    BaseFacts,
    ForeignFile,
    ForeignFormat,
    needed,
    number_in,
    only_matrices,
    rotated,
)

_PAIRS = {name: one.torchtune_pairs for name, one in FAMILIES.items() if one.torchtune_pairs is not None}
NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
_THEIRS = {theirs: ours for ours, theirs in NAMES.items()}


def _decode(file: ForeignFile, base: BaseFacts | None) -> dict[str, Factors]:
    alpha = number_in(file.facts, "lora_alpha", file.facts_at)
    found: dict[str, Factors] = {}
    for name, (down, up) in file.pairs.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if not match or match[2] not in _THEIRS:
            raise AdapterFileError("a module that torchtune's Llama has not", where=f"{file.where}: {name}")
        module = _THEIRS[match[2]]
        found[f"model.layers.{match[1]}.{module}"] = Factors(down, _turned(up, module, base, back=True), alpha)
    return found


def _encode(factors: Mapping[str, Factors], base: BaseFacts | None) -> ForeignFile:
    only_matrices(factors, "torchtune")
    factors, alpha, lost = with_one_alpha(factors, per_rank=False)
    if len({one.rank for one in factors.values()}) > 1:
        raise UnsupportedError("torchtune has one rank for all modules", hint="resize the adapter first")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, one in factors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if not match or match[2] not in NAMES:
            raise UnsupportedError("a module that torchtune's Llama has not", where=name)
        pairs[f"layers.{match[1]}.{NAMES[match[2]]}"] = (one.down, _turned(one.up, match[2], base))
    rank = next(iter(factors.values())).rank
    targets = sorted({name.rpartition(".")[2] for name in factors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    return ForeignFile(pairs, facts=config, lost=tuple(lost))


def _turned(up: Tensor, module: str, base: BaseFacts | None, back: bool = False) -> Tensor:
    base = needed(base, "torchtune", "its heads say how query and key rows are ordered")
    if base.model_type not in _PAIRS:
        raise UnsupportedError("an architecture that is not covered", got=base.model_type, expected=", ".join(_PAIRS))
    return rotated(up, module, (base.heads, base.kv_heads), back) if _PAIRS[base.model_type] else up


TORCHTUNE = ForeignFormat(
    "torchtune", (".lora_a.weight", ".lora_b.weight"), _decode, _encode, weights="adapter_0.safetensors"
)
