"""MLX (mlx-lm): `adapters.safetensors` and `adapter_config.json`, factors lying down: lora_a (in, r), lora_b (r, out).

What a file says of modules outside its layers is passed over there, so it is refused here.
One rank and one scale serve all modules: a smaller rank is filled up with zeros, another scale multiplied into lora_b.
"""

import re
from collections.abc import Mapping

from torch.nn.functional import pad

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.foreign.factors import Factors, with_one_alpha
from gossamer.files.foreign.format import BaseFacts, ForeignFile, ForeignFormat, number_in, only_matrices


def _decode(file: ForeignFile, base: BaseFacts | None) -> dict[str, Factors]:
    kind, parameters = file.facts.get("fine_tune_type", "lora"), file.facts.get("lora_parameters")
    if kind != "lora":
        raise UnsupportedError("only MLX's LoRA is covered", where=file.facts_at, got=f"fine_tune_type={kind!r}")
    if not isinstance(parameters, dict):
        raise AdapterFileError("no lora_parameters", where=file.facts_at)
    scale = number_in(parameters, "scale", file.facts_at)
    for name, pair in file.pairs.items():
        if any(factor.ndim != 2 for factor in pair):
            raise UnsupportedError("only matrices are covered", where=f"{file.where}: {name}")
    return {
        name: Factors(first.T.contiguous(), second.T.contiguous(), scale * first.shape[1])
        for name, (first, second) in file.pairs.items()
    }


def _encode(factors: Mapping[str, Factors], base: BaseFacts | None) -> ForeignFile:
    only_matrices(factors, "mlx")
    for name in factors:
        if not re.match(r"model\.layers\.\d+\.", name):
            raise UnsupportedError(
                "mlx-lm adapts modules of its layers alone, and passes over every other tensor without a word",
                where=name,
                expected="a path below model.layers",
                hint="leave the module out, or merge the adapter",
            )
    factors, scale, lost = with_one_alpha(factors, per_rank=True)
    rank = max(one.rank for one in factors.values())
    smaller = sum(one.rank < rank for one in factors.values())
    if smaller:
        lost.append(f"{smaller} modules' smaller ranks (filled up with zeros to {rank})")
    pairs = {
        name: (pad(one.down, (0, 0, 0, rank - one.rank)).T, pad(one.up, (0, rank - one.rank)).T)
        for name, one in factors.items()
    }
    keys = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in factors})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    return ForeignFile(pairs, facts=config, lost=tuple(lost))


MLX = ForeignFormat("mlx", (".lora_a", ".lora_b"), _decode, _encode, weights="adapters.safetensors", stamp="mlx")
