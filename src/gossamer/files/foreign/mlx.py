"""MLX (mlx-lm): `adapters.safetensors` and `adapter_config.json`, factors lying down: lora_a (in, r), lora_b (r, out).

What a file says of modules outside its layers is passed over there, so it is refused here.
One rank and one scale serve all modules: a smaller rank is filled up with zeros, another scale multiplied into lora_b.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch.nn.functional import pad

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.atomic import new_folder, write_json
from gossamer.files.folder import read_json
from gossamer.files.foreign.changes import Change, Changes, only_matrices, with_one_alpha
from gossamer.files.foreign.format import (
    Base,
    Format,
    number_in,
    paired,
    read_safetensors,
    refuse_rest,
    write_safetensors,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


class MLX(Format):
    """mlx-lm's adapter folder."""

    name = "mlx"
    reader = "mlx-lm"

    def detects(self, path: Path) -> bool:
        """See `Format`."""
        return (path / WEIGHTS).is_file()

    def read(self, path: Path, base: Base | None) -> Changes:
        """See `Format`."""
        config, where = read_json(path / CONFIG), str(path / CONFIG)
        kind = config.get("fine_tune_type", "lora")
        if kind != "lora":
            raise UnsupportedError("only MLX's LoRA is covered", where=where, got=f"fine_tune_type={kind!r}")
        parameters = config.get("lora_parameters")
        if not isinstance(parameters, dict):
            raise AdapterFileError("no lora_parameters", where=where)
        scale = number_in(parameters, "scale", where)
        tensors, _ = read_safetensors(path / WEIGHTS)
        pairs, rest = paired(tensors, (".lora_a", ".lora_b"), path / WEIGHTS)
        refuse_rest(rest, path / WEIGHTS, self.name)
        for name, pair in pairs.items():
            if any(factor.ndim != 2 for factor in pair):
                raise UnsupportedError("only matrices are covered", where=f"{path / WEIGHTS}: {name}")
        return {
            name: Change(first.T.contiguous(), second.T.contiguous(), scale * first.shape[1])
            for name, (first, second) in pairs.items()
        }

    def write(self, changes: Changes, path: Path, base: Base | None) -> list[str]:
        """See `Format`."""
        only_matrices(changes, self.name)
        for name in changes:
            if not re.match(r"model\.layers\.\d+\.", name):
                raise UnsupportedError(
                    "mlx-lm adapts modules of its layers alone, and passes over every other tensor without a word",
                    where=name,
                    expected="a path below model.layers",
                    hint="leave the module out, or merge the adapter",
                )
        changes, scale, lost = with_one_alpha(changes, per_rank=True)
        rank = max(one.rank for one in changes.values())
        smaller = sum(one.rank < rank for one in changes.values())
        if smaller:
            lost.append(f"{smaller} modules' smaller ranks (filled up with zeros to {rank})")
        tensors = {}
        for name, one in changes.items():
            tensors[f"{name}.lora_a"] = pad(one.down, (0, 0, 0, rank - one.rank)).T
            tensors[f"{name}.lora_b"] = pad(one.up, (0, rank - one.rank)).T
        keys = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in changes})
        config = {
            "fine_tune_type": "lora",
            "num_layers": -1,
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
        }
        with new_folder(path) as fresh:
            write_safetensors(fresh / WEIGHTS, tensors, {"format": "mlx"})
            write_json(fresh / CONFIG, config)
        return lost
