"""Each PEFT type, both ways: PEFT's files here, ours in PEFT, and nothing lost on the way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
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
)

import gossamer as gs
from gossamer.methods import METHODS, TargetedMethod
from tests.adapters import trained
from tests.conformance.oracle import Toys, config_of, logits, peft_loads, peft_saves, same_tensors, tensors_of

CLOSE = 2e-5
ATTENTION = ["q_proj", "v_proj"]
COPIED = "copies of the base's own weights"


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ATTENTION} | fields))


THEIRS: dict[str, tuple[str, PeftConfig]] = {
    "dora": ("llama", lora(use_dora=True, bias="all")),
    "dora on conv1d": ("gpt2", lora(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")),
    "embedding": ("llama", lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "dora on an embedding": ("gpt2", lora(target_modules=["wte", "c_fc"], use_dora=True, fan_in_fan_out=True)),
    "convolution": ("vit", lora(target_modules=["projection", "q_proj"])),
    "tokens": ("llama", lora(trainable_token_indices=[3, 250])),
    "named tokens": ("llama", lora(trainable_token_indices={"embed_tokens": [7, 2]})),
    "experts": ("mixtral", lora(target_parameters=["experts.gate_up_proj", "mlp.experts.down_proj"])),
    "experts of all layers, queries of one": (
        "mixtral",
        lora(target_modules=["q_proj"], target_parameters=["experts.down_proj"], layers_to_transform=[0]),
    ),
    "one expert matrix": ("qwen3_moe", lora(target_parameters=["experts.down_proj"], target_modules=[])),
    "experts by their old names": ("mixtral", lora(target_modules=["q_proj", "w1", "w2", "w3"])),
    "a layers pattern": ("llama", lora(layers_to_transform=[1], layers_pattern=["layers"])),
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 with a head": ("gpt2", IA3Config(task_type="CAUSAL_LM", modules_to_save=["ln_f"])),
    "vera": ("llama", VeraConfig(r=5, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])),
    "norms": ("llama", LNTuningConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])),
    "prefix": ("llama", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prompt": ("gpt2", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prompt and a head": (
        "llama",
        PromptTuningConfig(
            num_virtual_tokens=2, task_type="CAUSAL_LM", modules_to_save=["norm"], prompt_tuning_init="SAMPLE_VOCAB"
        ),
    ),
    "norms with biases": ("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_f"])),
}

OURS: dict[str, tuple[str, TargetedMethod]] = {
    "dora": ("llama", gs.DoRA(r=4, bias="all")),
    "dora on conv1d": ("gpt2", gs.DoRA(r=4, target_modules=("c_attn",))),
    "embedding": ("llama", gs.LoRA(r=4, target_modules=("embed_tokens", "lm_head", "q_proj"))),
    "dora on an embedding": ("gpt2", gs.DoRA(r=4, target_modules=("wte", "c_fc"))),
    "convolution": ("vit", gs.LoRA(r=4, target_modules=("projection", "q_proj"))),
    "tokens": ("llama", gs.LoRA(r=4, trainable_tokens=(3, 250))),
    "named tokens": ("llama", gs.LoRA(r=4, trainable_tokens={"embed_tokens": (7, 2)})),
    "experts": ("mixtral", gs.LoRA(r=4, target_parameters=("gate_up_proj", "experts.down_proj"), dropout=0.0)),
    "one expert matrix": ("qwen3_moe", gs.LoRA(target_modules=(), target_parameters=("down_proj",), dropout=0.5)),
    "experts by their old names": ("mixtral", gs.LoRA(r=4, target_modules=("q_proj", "w1", "w2"))),
    "experts of a layer": (
        "mixtral",
        gs.LoRA(target_modules=(), target_parameters=("down_proj",), layers_to_transform=1),
    ),
    "pissa": ("llama", gs.LoRA(r=4, start="pissa", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 3.0})),
    "olora, rslora": ("gpt2", gs.LoRA(r=4, start="olora", scaling="rslora", modules_to_save=("ln_f",))),
    "pissa on dora": ("llama", gs.DoRA(r=4, start="pissa_fast", target_modules=("q_proj", "o_proj"))),
    "ia3": ("llama", METHODS["ia3"]()),
    "ia3 with some outputs": (
        "llama",
        METHODS["ia3"](target_modules="all-linear", feedforward_modules=("down_proj", "mlp.up_proj")),
    ),
    "ia3 of a layer": ("gpt2", METHODS["ia3"](layers_to_transform=1)),
    "vera": ("llama", METHODS["vera"](r=5, exclude_modules=("mlp.down_proj",))),
    "prefix": ("gpt2", METHODS["prefix"](num_virtual_tokens=3)),
    "prompt": ("llama", METHODS["prompt"](num_virtual_tokens=3, modules_to_save=("norm",))),
    "norms": ("llama", METHODS["norm"](modules_to_save=("lm_head",))),
}


def outputs(model: Any) -> torch.Tensor:
    """Logits of a toy, whatever it takes."""
    if getattr(getattr(model, "config", None), "model_type", "") != "vit":
        return logits(model)[:, -9:]  # PEFT gives those of virtual tokens too
    with torch.no_grad():
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))).logits


def saved_by_peft(name: str, config: PeftConfig, toy: Toys, folder: Path, monkeypatch: Any) -> torch.Tensor:
    monkeypatch.setattr("tests.conformance.oracle.logits", outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_saves(toy(name), config, folder)  # pyright: ignore[reportArgumentType]


def loaded_by_peft(model: Any, folder: Path) -> Any:
    """As the oracle loads it; for what PEFT warns of by itself at every norm, without that warning."""
    if config_of(folder)["peft_type"] != "LN_TUNING":
        return peft_loads(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Unsupported layer type|`is_gradient_checkpointing`")
        return PeftModel.from_pretrained(model, str(folder)).eval()


def without_copies(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors_of(folder).items() if not name.endswith("base_layer.weight")}


@pytest.mark.parametrize("case", THEIRS)
def test_pefts_file(case: str, toy: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, config = THEIRS[case]
    theirs = saved_by_peft(name, config, toy, tmp_path / "theirs", monkeypatch)
    if without_copies(tmp_path / "theirs").keys() != tensors_of(tmp_path / "theirs").keys():
        with pytest.warns(UserWarning, match=COPIED):
            adapter = gs.Adapter.load(tmp_path / "theirs")
    else:
        adapter = gs.Adapter.load(tmp_path / "theirs")
    model = toy(name)
    base = outputs(model)
    gs.attach(model, adapter)
    assert (outputs(model) - theirs).abs().max() <= CLOSE
    assert (base - theirs).abs().max() > 1e-3, "the adapter must do something"
    for value, folder in ((adapter, tmp_path / "ours"), (gs.capture(model), tmp_path / "captured")):
        value.save(folder)
        kept, ours = without_copies(tmp_path / "theirs"), tensors_of(folder)
        assert kept.keys() == ours.keys()
        assert all(torch.equal(kept[key], ours[key]) and kept[key].dtype == ours[key].dtype for key in kept)
        assert config_of(folder) == config_of(tmp_path / "theirs")
        assert gs.Adapter.load(folder) == value


@pytest.mark.parametrize("case", OURS)
def test_our_file(case: str, toy: Toys, tmp_path: Path):
    name, spec = OURS[case]
    model = toy(name)
    base = outputs(model)
    adapter = trained(model, spec)
    ours = outputs(model)
    assert (base - ours).abs().max() > 1e-3
    again = gs.Adapter.load(adapter.save(tmp_path / "ours"))
    assert again == adapter
    assert again.spec == spec
    assert again.tensors.keys() == adapter.tensors.keys()
    theirs = loaded_by_peft(toy(name), tmp_path / "ours")
    assert (outputs(theirs) - ours).abs().max() <= CLOSE
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    assert same_tensors(tmp_path / "ours", tmp_path / "theirs")
    said, back = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert all(back[key] == value for key, value in said.items() if value is not None), "PEFT only adds to it"
    (tmp_path / "ours" / "gossamer.json").unlink()
    plain = toy(name)
    gs.attach(plain, gs.Adapter.load(tmp_path / "ours"))
    assert (outputs(plain) - ours).abs().max() <= CLOSE
