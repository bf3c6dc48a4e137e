"""Adapter folders, both directions: PEFT computes the same logits from ours, and we from PEFT's; nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer as gs
from tests.adapters import shaken, trained
from tests.conformance.oracle import (
    CONFIGS,
    TARGETS,
    Toys,
    config_of,
    logits,
    peft_config,
    peft_loads,
    peft_saves,
    same_tensors,
    spec,
    tensors_of,
)

CLOSE = 1e-5
every_toy = pytest.mark.parametrize("name", TARGETS)
every_config = pytest.mark.parametrize("config", CONFIGS)
every_case = pytest.mark.parametrize(
    ("config", "scaling"), [*((config, "standard") for config in CONFIGS), ("plain", "rslora"), ("patterns", "rslora")]
)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@every_toy
@every_case
def test_ours_in_peft(name: str, config: str, scaling: str, toy: Toys, tmp_path: Path):
    model = toy(name)
    base = logits(model)
    trained(model, spec(name, config, scaling)).save(tmp_path)
    ours = logits(model)
    theirs = logits(peft_loads(toy(name), tmp_path))
    assert difference(ours, base) > 1e-2, "the adapter must do something"
    assert difference(ours, theirs) <= CLOSE


@every_toy
@every_case
def test_pefts_here(name: str, config: str, scaling: str, toy: Toys, tmp_path: Path):
    theirs = peft_saves(toy(name), peft_config(name, config, scaling), tmp_path)
    model = toy(name)
    base = logits(model)
    adapter = gs.Adapter.load(tmp_path)
    gs.attach(model, adapter)
    assert difference(theirs, base) > 1e-2
    assert difference(logits(model), theirs) <= CLOSE
    assert adapter.num_parameters == sum(tensor.numel() for tensor in tensors_of(tmp_path).values())
    gs.merge(model)
    assert difference(logits(model), theirs) <= 10 * CLOSE


@every_toy
@every_config
def test_peft_to_us_to_peft_loses_nothing(name: str, config: str, toy: Toys, tmp_path: Path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peft_saves(toy(name), peft_config(name, config), theirs)
    gs.Adapter.load(theirs).save(ours)
    assert same_tensors(theirs, ours)
    assert config_of(theirs) == config_of(ours)
    model = toy(name)
    gs.attach(model, gs.Adapter.load(theirs))
    gs.capture(model).save(ours)
    assert same_tensors(theirs, ours), "through a model as well"
    assert config_of(theirs) == config_of(ours)


@every_toy
@every_config
def test_us_to_peft_to_us_loses_nothing(name: str, config: str, toy: Toys, tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    adapter = trained(toy(name), spec(name, config))
    adapter.save(ours)
    peft_loads(toy(name), ours).save_pretrained(str(theirs))
    back = gs.Adapter.load(theirs)
    assert same_tensors(ours, theirs)
    assert back.named_tensors().keys() == adapter.named_tensors().keys()
    changed = {key for key, value in config_of(ours).items() if config_of(theirs).get(key) != value}
    assert changed <= {"auto_mapping", "base_model_name_or_path", "peft_version"}, "what PEFT fills in itself"
    model, again = toy(name), toy(name)
    gs.attach(model, adapter)
    gs.attach(again, back)
    assert torch.equal(logits(model), logits(again))


def test_unknown_keys_are_kept(toy: Toys, tmp_path: Path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peft_saves(toy("llama"), peft_config("llama", "plain"), theirs)
    path = theirs / "adapter_config.json"
    added = {"colour_of_the_future": {"deep": [1, None]}, "revision": "abc", "task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    with pytest.warns(UserWarning, match="colour_of_the_future"):
        adapter = gs.Adapter.load(theirs)
    adapter.save(ours)
    with pytest.warns(UserWarning, match="colour_of_the_future"):
        again = gs.Adapter.load(ours)
    assert config_of(theirs) == config_of(ours)
    assert again == adapter


@every_toy
def test_all_linear_takes_what_peft_takes(name: str, toy: Toys, tmp_path: Path):
    model = toy(name)
    trained(model, gs.LoRA(r=2)).save(tmp_path)
    loaded = peft_loads(toy(name), tmp_path)
    assert difference(logits(loaded), logits(model)) <= CLOSE
    peft_saves(toy(name), peft_config(name, "plain", target_modules="all-linear", task_type=task(name)), tmp_path / "x")
    factors = {key for key in tensors_of(tmp_path / "x") if ".lora_" in key}
    assert set(tensors_of(tmp_path)) == factors


def task(name: str) -> str:
    return "SEQ_CLS" if name == "bert" else "CAUSAL_LM"


@pytest.mark.parametrize("name", ["bert", "llama_classifier"])
def test_a_sequence_classifier_of_pefts(name: str, toy: Toys, tmp_path: Path):
    """PEFT adds modules_to_save ["classifier", "score"] by itself; no model has both."""
    targets = ["query" if name == "bert" else "q_proj"]
    config = peft_config("llama", "plain", task_type="SEQ_CLS", target_modules=targets)
    theirs = peft_saves(toy(name), config, tmp_path / "theirs")
    model = toy(name)
    gs.attach(model, gs.Adapter.load(tmp_path / "theirs"))
    assert difference(logits(model), theirs) <= CLOSE
    gs.capture(model).save(tmp_path / "ours")
    assert config_of(tmp_path / "theirs") == config_of(tmp_path / "ours")
    assert same_tensors(tmp_path / "theirs", tmp_path / "ours")


def test_a_suffix_without_a_dot_in_modules_to_save(toy: Toys, tmp_path: Path):
    """PEFT's modules_to_save ["norm"] also takes every `input_layernorm`; ours takes `norm`; each reads the other's."""
    config = peft_config("llama", "plain", modules_to_save=["norm"])
    theirs = peft_saves(toy("llama"), config, tmp_path / "theirs")
    model = toy("llama")
    gs.attach(model, gs.Adapter.load(tmp_path / "theirs"))
    assert difference(logits(model), theirs) <= CLOSE
    other = toy("llama")
    trained(other, gs.LoRA(target_modules=TARGETS["llama"], modules_to_save=("norm",))).save(tmp_path / "ours")
    assert difference(logits(peft_loads(toy("llama"), tmp_path / "ours")), logits(other)) <= CLOSE


def test_embeddings_saved_whole(toy: Toys, tmp_path: Path):
    saved = ("embed_tokens", "lm_head")
    theirs = peft_saves(toy("llama"), peft_config("llama", "plain", modules_to_save=list(saved)), tmp_path / "theirs")
    model = toy("llama")
    gs.attach(model, gs.Adapter.load(tmp_path / "theirs"))
    assert difference(logits(model), theirs) <= CLOSE
    other = toy("llama")
    trained(other, gs.LoRA(r=2, modules_to_save=saved)).save(tmp_path / "ours")
    assert difference(logits(peft_loads(toy("llama"), tmp_path / "ours")), logits(other)) <= CLOSE


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (r".*layers\.1.*(q|up)_proj", ()),
        (r"model\.layers\.\d\.self_attn\..*_proj", ("k_proj",)),
        ("all-linear", ".*mlp.*"),
    ],
)
def test_expressions(targets: str, excluded: str | tuple[str, ...], toy: Toys, tmp_path: Path):
    model = toy("llama")
    trained(model, gs.LoRA(r=2, target_modules=targets, exclude_modules=excluded)).save(tmp_path)
    assert difference(logits(peft_loads(toy("llama"), tmp_path)), logits(model)) <= CLOSE


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "fc1"), ".*q_proj"])
def test_layers_of_a_bare_backbone(targets: str | tuple[str, ...], toy: Toys, tmp_path: Path):
    """PEFT finds no layer index in `layers.0.q_proj`: what we write must not leave it to find one."""
    body = toy("opt").model.decoder
    trained(body, gs.LoRA(target_modules=targets, layers_to_transform=1)).save(tmp_path)
    expected = set(tensors_of(tmp_path))
    loaded = peft_loads(toy("opt").model.decoder, tmp_path)
    found = {key.replace(".default", "") for key, _ in loaded.named_parameters() if ".lora_" in key}
    assert found == expected


def test_one_path_that_is_the_end_of_another(tmp_path: Path):
    """`fc` is adapted and `block.fc` is not; a list of suffixes cannot say that, and the file must."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block["fc"](self.fc(x))

    model, x = Model().requires_grad_(False), torch.ones(1, 4)
    adapter = trained(model, gs.LoRA(r=2, exclude_modules=("block.fc",)))
    adapter.save(tmp_path)
    twin = Model()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if "gossamer" not in key.split(".")})
    assert difference(peft_loads(twin, tmp_path)(x), model(x)) <= CLOSE
    doubled = adapter + adapter
    with gs.using(model, None):
        gs.attach(model, doubled, "sum")
        assert gs.capture(model, "sum").paths == ("fc",)


def test_values_made_here_are_silent_in_peft_too(toy: Toys, tmp_path: Path):
    """Sums and multiples have no PEFT config behind them; on GPT-2 PEFT warns unless fan_in_fan_out is right."""
    model = toy("gpt2")
    a = trained(model, spec("gpt2", "plain"), "a", 1)
    b = trained(model, spec("gpt2", "patterns", "rslora"), "b", 2)
    for number, value in enumerate((a + b, 0.5 * a, a - b, -b)):
        folder = value.save(tmp_path / str(number))
        gs.attach(model, value, str(number))
        assert difference(logits(peft_loads(toy("gpt2"), folder)), logits(model)) <= CLOSE


def test_shaken_adapters_differ_from_each_other(toy: Toys):
    """What the tests above compare must not be equal by accident."""
    model = toy("llama")
    gs.attach(model, spec("llama", "plain"))
    before = logits(model)
    shaken(model, "default")
    assert difference(before, logits(model)) > 1e-2
