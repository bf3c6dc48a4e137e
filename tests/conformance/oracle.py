"""PEFT as the oracle: toys, the configs both sides understand, and how PEFT saves and loads them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import gossamer as gs
from gossamer.methods import METHODS, TargetedMethod
from gossamer.models import tiny_inputs
from tests.adapters import tokens
from tests.conformance.matrix import Case

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


# The cases of the matrix ---------------------------------------------------------------------------------------------

_KINDS: dict[str, type[PeftConfig]] = {
    "lora": LoraConfig,
    "dora": LoraConfig,
    "ia3": IA3Config,
    "vera": VeraConfig,
    "norm": LNTuningConfig,
    "prefix": PrefixTuningConfig,
    "prompt": PromptTuningConfig,
}
_THEIR_NAMES = {
    "alpha": "lora_alpha",
    "trainable_tokens": "trainable_token_indices",
    "projection_seed": "projection_prng_key",
}

NOISE = {"lora": 0.1, "dora": 0.1, "vera": 0.5}
"""How far every trained number is moved, by method (0.3 for the others): in bfloat16 too, the change stands out."""
_HARMLESS = (
    "`is_gradient_checkpointing`",  # PEFT's use of transformers
    "Unsupported layer type",  # of each norm that is not torch's own LayerNorm; LN_TUNING takes any
    "Specified to not (save|load) vera_A and vera_B",  # what save_projection=False is for
    "The following (rank|alpha)_pattern keys",  # it looks for patterns of parameters among modules
    "Model has `tie_word_embeddings=True`",  # it merges wrongly there, and we refuse to
)
"""Warnings of PEFT's that say nothing about the file; every other one is an error."""


def our_spec(case: Case) -> TargetedMethod:
    return METHODS[case.method](**case.fields)


def their_spec(case: Case) -> PeftConfig:
    """PEFT's config of the same case."""
    fields = {_THEIR_NAMES.get(name, name): _listed(value) for name, value in case.fields.items()}
    if case.method in ("lora", "dora"):
        fields |= {"use_rslora": fields.pop("scaling", "standard") == "rslora", "use_dora": case.method == "dora"}
    if case.method in ("lora", "dora", "ia3", "vera"):
        fields["fan_in_fan_out"] = case.architecture == "gpt2"
    if case.method == "vera":
        fields["save_projection"] = case.config != "drawn"
    if case.method in ("prefix", "prompt"):
        fields["task_type"] = "CAUSAL_LM"
    return _KINDS[case.method](**fields)


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def only_noise() -> Iterator[None]:
    """A warning of PEFT's is an error, so that a silent no-op cannot pass; see `_HARMLESS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for words in _HARMLESS:
            warnings.filterwarnings("ignore", words)
        yield


def attached_by_peft(model: nn.Module, case: Case) -> PeftModel:
    """PEFT's wrapper, as if it had been trained."""
    with only_noise():
        wrapped = get_peft_model(model, their_spec(case)).eval()  # pyright: ignore[reportArgumentType]
    return moved(wrapped, NOISE.get(case.method, 0.3))


def moved(wrapped: Any, noise: float) -> Any:
    """Every trained number of PEFT's, moved by a seeded random one."""
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return wrapped


def loaded_by_peft(model: nn.Module, folder: Path) -> PeftModel:
    with only_noise():
        return PeftModel.from_pretrained(model, str(folder)).eval()  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def said(model: nn.Module, case: Case) -> Tensor:
    """What a toy says: its logits, CLIP's by image; of real tokens alone, PEFT gives those of a prompt too."""
    dtype = getattr(torch, case.dtype)
    inputs = tiny_inputs(case.architecture)
    out = model(**{name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()})
    if case.architecture == "clip":
        return out.logits_per_image.float()
    logits = out.logits.float()
    return logits[:, -inputs["input_ids"].shape[1] :] if case.method == "prompt" else logits


OLD_KEYS = {"peft_type", "target_modules", "r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out"}
OLD_KEYS |= {"base_model_name_or_path", "inference_mode", "init_lora_weights", "modules_to_save", "task_type"}
"""What the first releases of PEFT wrote."""


def aged(folder: Path) -> None:
    """Leave in the config what was known then."""
    path = folder / "adapter_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key in OLD_KEYS}
    path.write_text(json.dumps(kept))
