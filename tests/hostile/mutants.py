"""A seeded generator of damaged adapter folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "gossamer.json"

Mutator = Callable[[Path, random.Random], str]
"""Damages a folder in place; returns what it did."""

WRONG_FIELDS: dict[str, list[Any]] = {
    "peft_type": ["IA3", "LOHA", "VERA", "lora", "", None, 3, ["LORA"]],
    "r": [0, -1, True, "8", 8.0, 1e9, 10**9, None, [2], 3],
    "lora_alpha": [None, "16", True, [16], float("inf"), float("nan"), {}],
    "target_modules": [None, [], "", ["nope"], "no.*pe", "(", [1], 5, {"q_proj": 1}, [""]],
    "exclude_modules": [["nope"], 5, "(", ["q_proj"]],
    "modules_to_save": [["nope"], "norm", 5, [5], [""]],
    "layers_to_transform": [[7], -1, "0", [0.5], True],
    "layers_pattern": ["layers"],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": 5}, {"(": 2}, {"nope": 2}, {"q_proj": "2"}, [1], {"(?i)q_proj": 2}],
    "alpha_pattern": [{"q_proj": None}, {"q_proj": float("inf")}, {"(": 2}, {"nope": 2}, "x"],
    "lora_dropout": [1.0, -0.1, "0", None, [0]],
    "bias": ["some", True, 3, ["all"]],
    "use_rslora": ["yes", 1, None, "true", [True]],
    "use_dora": [True, "yes"],
    "lora_bias": [True, "yes"],
    "init_lora_weights": ["pissa", "olora", "corda", "lora_ga", 7, []],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "target_parameters": [["q_proj.weight"]],
    "layer_replication": [[[0, 1], [1, 2]]],
    "lora_alfa": [64],
    "loraalpha": [64],
    "target_module": [["q_proj"]],
}
"""PEFT config key -> values that must not be accepted."""


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def truncate(folder: Path, draw: random.Random) -> str:
    file = draw.choice([one for one in (CONFIG, WEIGHTS, OURS) if (folder / one).exists()])
    data = (folder / file).read_bytes().rstrip()
    kept = draw.randrange(len(data))
    (folder / file).write_bytes(data[:kept])
    return f"truncate {file} to {kept}"


def flip_header(folder: Path, draw: random.Random) -> str:
    position, bit = draw.randrange(header_size((folder / WEIGHTS).read_bytes())), draw.randrange(8)
    flip(folder / WEIGHTS, position, bit)
    return f"flip header {position}.{bit}"


def lie_about_header(folder: Path, draw: random.Random) -> str:
    size = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, 100 * 2**20 + 1])
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + data[8:])
    return f"header size {size}"


def append(folder: Path, draw: random.Random) -> str:
    with open(folder / WEIGHTS, "ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 64)))
    return "append"


def drop(folder: Path, draw: random.Random) -> str:
    name = draw.choice(sorted(load_file(folder / WEIGHTS)))
    rewritten(folder, lambda tensors: tensors.pop(name))
    return f"drop {name}"


def rename(folder: Path, draw: random.Random) -> str:
    name = draw.choice(sorted(load_file(folder / WEIGHTS)))
    old, new = draw.choice(
        [
            ("lora_A", "lora_C"),
            ("lora_", ""),
            ("lora_B", "lora_magnitude_vector"),
            ("base_model.model.", ""),
            ("model.layers", "language_model.layers"),
            ("layers.", "layer."),
            ("q_proj", "k_proj"),
            (".weight", ""),
            ("lora_magnitude_vector", "lora_A.weight"),
            ("vera_lambda_d", "vera_lambda_b"),
            ("base_model.vera_A", "base_model.vera_B"),
            ("ia3_l", "ia3"),
            ("ln_tuning_layers.", ""),
            (".base_layer", ""),
            ("experts.lora", "experts.base_layer.base_layer.lora"),
        ]
    )
    rewritten(folder, lambda tensors: tensors.update({name.replace(old, new): tensors.pop(name)}))
    return f"rename {name}: {old} -> {new}"


def add(folder: Path, draw: random.Random) -> str:
    prefix = "base_model.model.model.layers.0.self_attn."
    name = prefix + draw.choice(
        ["o_proj.lora_A.weight", "q_proj.bias", "q_proj.base_layer.weight", "q_proj.lora_B.bias"]
    )
    rewritten(folder, lambda tensors: tensors.update({name: torch.zeros(2, 64)}))
    return f"add {name}"


def poison(folder: Path, draw: random.Random) -> str:
    name, value = draw.choice(sorted(load_file(folder / WEIGHTS))), draw.choice(["nan", "inf", "-inf"])
    rewritten(folder, lambda tensors: tensors[name].view(-1)[draw.randrange(tensors[name].numel())].fill_(float(value)))
    return f"{value} in {name}"


def retype(folder: Path, draw: random.Random) -> str:
    name = draw.choice(sorted(load_file(folder / WEIGHTS)))
    kind = draw.choice([torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64])
    rewritten(folder, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    return f"{name} as {kind}"


def reshape(folder: Path, draw: random.Random) -> str:
    name = draw.choice(sorted(load_file(folder / WEIGHTS)))
    shapes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t.T if t.ndim == 2 else t.flatten(),
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t[:-1],
        lambda t: t[:, :-1],
        lambda t: t[:0],
        lambda t: torch.cat([t, t]),
        lambda t: torch.zeros(()),
    ]
    chosen = draw.randrange(len(shapes))
    rewritten(folder, lambda tensors: tensors.update({name: shapes[chosen](tensors[name])}))
    return f"reshape {name} by {chosen}"


def wrong_field(folder: Path, draw: random.Random) -> str:
    key = draw.choice(sorted(WRONG_FIELDS))
    value = draw.choice(WRONG_FIELDS[key])
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {key: value}))
    return f"{key} = {value!r}"


def delete_field(folder: Path, draw: random.Random) -> str:
    config = json.loads((folder / CONFIG).read_text())
    meant = ("peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "feedforward_modules", "use_dora")
    key = draw.choice([key for key in meant if config.get(key)])
    del config[key]
    (folder / CONFIG).write_text(json.dumps(config))
    return f"without {key}"


def break_json(folder: Path, draw: random.Random) -> str:
    file = draw.choice([one for one in (CONFIG, OURS) if (folder / one).exists()])
    text = (folder / file).read_text().strip()
    broken = {
        "twice": text[:-1] + ', "r": 4, "r": 4}',
        "deep": text[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "list": f"[{text}]",
        "number": "1" * 5000,
        "null": "null",
        "empty": "",
        "latin-1": "\xff" + text,
    }
    kind = draw.choice([*broken])
    (folder / file).write_bytes(broken[kind].encode("latin-1"))
    return f"{file}: {kind}"


STRUCTURAL: tuple[Mutator, ...] = (
    truncate,
    flip_header,
    lie_about_header,
    append,
    drop,
    rename,
    add,
    poison,
    retype,
    reshape,
    wrong_field,
    delete_field,
    break_json,
)
"""What can be noticed in any adapter."""


def flip_data(folder: Path, draw: random.Random) -> str:
    data = (folder / WEIGHTS).read_bytes()
    position, bit = draw.randrange(header_size(data), len(data)), draw.randrange(8)
    flip(folder / WEIGHTS, position, bit)
    return f"flip data {position}.{bit}"


def _by_shape(tensors: dict[str, torch.Tensor]) -> dict[torch.Size, list[str]]:
    """Names of tensors of equal shape, sorted."""
    found: dict[torch.Size, list[str]] = {}
    for name in sorted(tensors):
        found.setdefault(tensors[name].shape, []).append(name)
    return found


def swap(folder: Path, draw: random.Random) -> str:
    tensors = load_file(folder / WEIGHTS)
    alike = [[*names] for names in _by_shape(tensors).values() if len(names) > 1]
    if not alike:
        return flip_data(folder, draw)
    one, other = draw.sample(draw.choice(alike), 2)
    rewritten(folder, lambda tensors: tensors.update({one: tensors[other], other: tensors[one]}))
    return f"swap {one} and {other}"


def round_off(folder: Path, draw: random.Random) -> str:
    name = draw.choice(sorted(load_file(folder / WEIGHTS)))
    kind = draw.choice([torch.float16, torch.bfloat16, torch.float64])
    rewritten(folder, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    return f"{name} as {kind}"


def flip_text(folder: Path, draw: random.Random) -> str:
    file = draw.choice([CONFIG, OURS])
    position, bit = draw.randrange(len((folder / file).read_bytes())), draw.randrange(8)
    flip(folder / file, position, bit)
    return f"flip {file} {position}.{bit}"


def other_scale(folder: Path, draw: random.Random) -> str:
    change = draw.choice([{"lora_alpha": 5}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 7}}])
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    return f"{change}"


def wrong_description(folder: Path, draw: random.Random) -> str:
    key = draw.choice(["digest", "spec", "base", "provenance"])
    value = draw.choice(["x", 3, [], ["x"], {"name": "lora"}, {"name": []}, "0" * 64])
    ours = json.loads((folder / OURS).read_text())
    (folder / OURS).write_text(json.dumps(ours | {key: value}))
    return f"gossamer.json: {key} = {value!r}"


NUMERIC: tuple[Mutator, ...] = (flip_data, swap, round_off, flip_text, other_scale, wrong_description)
"""What only our digest and description can notice."""
