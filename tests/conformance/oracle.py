"""PEFT as the oracle: toys, the configs both sides understand, and how PEFT saves and loads them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import gossamer as gs
from tests.adapters import tokens

Toys = Callable[[str], Any]

TARGETS = {
    "llama": ("q_proj", "down_proj"),
    "mistral": ("k_proj", "up_proj"),
    "gemma": ("v_proj", "gate_proj"),
    "qwen2": ("q_proj", "o_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "opt": ("out_proj", "fc1"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "bert": ("query", "output.dense"),
}
HEADS = {
    "gemma": ("model.norm",),
    "gpt2": ("ln_f",),
    "opt": ("final_layer_norm",),
    "gpt_neox": ("final_layer_norm",),
    "bert": ("classifier",),
}
"""What is trained whole; `lm_head` where it is not listed. Never a tied weight: PEFT warns about those."""

CONFIGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain": lambda _: {},
    "patterns": lambda name: {"rank_pattern": {TARGETS[name][0]: 5}, "alpha_pattern": {TARGETS[name][1]: 3.0}},
    "whole": lambda name: {"modules_to_save": HEADS.get(name, ("lm_head",))},
    "all biases": lambda _: {"bias": "all"},
    "own biases": lambda _: {"bias": "lora_only"},
    "one layer": lambda _: {"layers_to_transform": (1,)},
}


def spec(name: str, config: str, scaling: str = "standard") -> gs.LoRA:
    """Our spec of one case."""
    fields = CONFIGS[config](name) | {"scaling": scaling}
    return gs.LoRA(r=3, alpha=6.0, target_modules=TARGETS[name], **fields)


def peft_config(name: str, config: str, scaling: str = "standard", **more: Any) -> LoraConfig:
    """PEFT's spec of the same case."""
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in CONFIGS[config](name).items()}
    same: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": list(TARGETS[name]),
        "use_rslora": scaling == "rslora",
    }
    return LoraConfig(**(same | {"fan_in_fan_out": name == "gpt2"} | fields | more))


def peft_saves(model: nn.Module, config: LoraConfig, folder: Path) -> Tensor:
    """Attach with PEFT, move every trained number, save; returns the logits PEFT computes."""
    wrapped = get_peft_model(model, config).eval()  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(str(folder))
    return logits(wrapped)


def peft_loads(model: nn.Module, folder: Path) -> PeftModel:
    """Load with PEFT; a warning of its is an error, so that a silent no-op cannot pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's use of transformers
        return PeftModel.from_pretrained(model, str(folder)).eval()  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    """The config as a dict; lists stand for sets, so they compare sorted."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in config.items()}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same names, dtypes and bits."""
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
