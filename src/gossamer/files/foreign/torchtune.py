"""torchtune: `adapter_0.safetensors` under torchtune's own names, and `adapter_config.json` with rank and alpha.

Its Llama models hold query and key rows in pairs (Meta's order), so those rows of lora_b are reordered.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.families import FAMILIES
from gossamer.files.atomic import new_folder, write_json
from gossamer.files.folder import read_json
from gossamer.files.foreign.changes import Change, Changes, only_matrices, with_one_alpha
from gossamer.files.foreign.format import (
    Base,
    Format,
    needed,
    number_in,
    paired,
    read_safetensors,
    refuse_rest,
    rotated,
    write_safetensors,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_0.safetensors"
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


class Torchtune(Format):
    """torchtune's adapter folder."""

    name = "torchtune"
    reader = "torchtune"

    def detects(self, path: Path) -> bool:
        """See `Format`."""
        return (path / WEIGHTS).is_file()

    def read(self, path: Path, base: Base | None) -> Changes:
        """See `Format`."""
        base = needed(base, self.name, "its heads say how query and key rows are ordered")
        alpha = number_in(read_json(path / CONFIG), "lora_alpha", str(path / CONFIG))
        tensors, _ = read_safetensors(path / WEIGHTS)
        pairs, rest = paired(tensors, (".lora_a.weight", ".lora_b.weight"), path / WEIGHTS)
        refuse_rest(rest, path / WEIGHTS, self.name)
        theirs = {value: key for key, value in NAMES.items()}
        found: Changes = {}
        for name, (down, up) in pairs.items():
            match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
            if not match or match[2] not in theirs:
                raise AdapterFileError("a module that torchtune's Llama has not", where=f"{path / WEIGHTS}: {name}")
            module = theirs[match[2]]
            found[f"model.layers.{match[1]}.{module}"] = Change(down, _turned(up, module, base, back=True), alpha)
        return found

    def write(self, changes: Changes, path: Path, base: Base | None) -> list[str]:
        """See `Format`."""
        base = needed(base, self.name, "its heads say how query and key rows are ordered")
        only_matrices(changes, self.name)
        changes, alpha, lost = with_one_alpha(changes, per_rank=False)
        if len({one.rank for one in changes.values()}) > 1:
            raise UnsupportedError("torchtune has one rank for all modules", hint="resize the adapter first")
        tensors = {}
        for name, one in changes.items():
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
            if not match or match[2] not in NAMES:
                raise UnsupportedError("a module that torchtune's Llama has not", where=name)
            stem = f"layers.{match[1]}.{NAMES[match[2]]}"
            tensors[f"{stem}.lora_a.weight"] = one.down
            tensors[f"{stem}.lora_b.weight"] = _turned(one.up, match[2], base)
        rank = next(iter(changes.values())).rank
        targets = sorted({name.rpartition(".")[2] for name in changes})
        with new_folder(path) as fresh:
            write_safetensors(fresh / WEIGHTS, tensors, {"format": "pt"})
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}
            write_json(fresh / CONFIG, config)
        return lost


def _turned(up: Tensor, module: str, base: Base, back: bool = False) -> Tensor:
    if base.model_type not in _PAIRS:
        raise UnsupportedError("an architecture that is not covered", got=base.model_type, expected=", ".join(_PAIRS))
    if not _PAIRS[base.model_type] or not module.endswith(("q_proj", "k_proj")):
        return up
    return rotated(up, base.heads if module.endswith("q_proj") else base.kv_heads, back)
