"""Files that PEFT wrote long ago, or writes and a strict reader could stumble over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import AdapterFileError, UnsupportedError
from tests.adapters import as_peft_writes, trained
from tests.conformance.oracle import Toys, logits, peft_loads, same_tensors, tensors_of

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def written(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    save_file({PREFIX + name: value for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name): value for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def test_missing_keys_take_pefts_defaults_and_say_so(toy: Toys, tmp_path: Path):
    trained(toy("llama"), gs.LoRA(r=8, alpha=8.0, target_modules=("q_proj",))).save(tmp_path)
    as_peft_writes(tmp_path)
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="r=8, lora_alpha=8"):
        adapter = gs.Adapter.load(tmp_path)
    assert adapter.spec == gs.LoRA(r=8, alpha=8.0, target_modules=("q_proj",), start="kaiming")
    model = toy("llama")
    gs.attach(model, adapter)
    assert (logits(model) - logits(peft_loads(toy("llama"), tmp_path))).abs().max() <= 1e-5
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config


def test_doras_magnitude_by_its_older_name(toy: Toys, tmp_path: Path):
    adapter = trained(toy("llama"), gs.DoRA(r=2))
    adapter.save(tmp_path)
    as_peft_writes(tmp_path)
    renamed(tmp_path, lambda name: name + ".weight" if name.endswith("lora_magnitude_vector") else name)
    assert gs.Adapter.load(tmp_path).named_tensors().keys() == adapter.named_tensors().keys()


@pytest.mark.parametrize("layers", [None, [0]])
def test_layers_pattern_needs_layers(layers: list[int] | None, toy: Toys, tmp_path: Path):
    trained(toy("llama"), gs.LoRA(r=2, layers_to_transform=0)).save(tmp_path)
    as_peft_writes(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    changed = config | {"layers_pattern": "layers", "layers_to_transform": layers}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    if layers is None:
        with pytest.raises(AdapterFileError, match="layers_pattern"):
            gs.Adapter.load(tmp_path)
    else:
        gs.attach(toy("llama"), gs.Adapter.load(tmp_path))


def test_a_copy_of_the_base_is_only_what_it_can_be(tmp_path: Path):
    factors = {"embed.lora_embedding_A": torch.ones(2, 9), "embed.lora_embedding_B": torch.ones(4, 2)}
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["embed"]}
    written(tmp_path, factors | {"embed.base_layer.weight": torch.ones(9, 4)}, **config)
    with pytest.warns(UserWarning, match="embed"):
        assert [*gs.Adapter.load(tmp_path).named_tensors()] == ["embed.lora_embedding_A", "embed.lora_embedding_B"]
    written(tmp_path, factors | {"embed.base_layer.weight": torch.ones(4, 9)}, **config)
    with pytest.raises(AdapterFileError, match="does not fit"):
        gs.Adapter.load(tmp_path)
    linear = {"embed.lora_A.weight": torch.ones(2, 9), "embed.lora_B.weight": torch.ones(4, 2)}
    written(tmp_path, linear | {"embed.base_layer.weight": torch.ones(4, 9)}, **config)
    with pytest.raises(AdapterFileError, match="base's own"):
        gs.Adapter.load(tmp_path)


class Attending(nn.Module):
    """torch's own attention, and a convolution in two groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict(
            {"attn": nn.MultiheadAttention(8, 2, batch_first=True), "conv": nn.Conv1d(8, 8, 3, groups=2, padding=1)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["conv"](x.transpose(1, 2)).transpose(1, 2)
        return self.body["attn"](x, x, x)[0]


def once(wrapped: Any) -> Any:
    """PEFT 0.21 adds the change of an attention's `out_proj` twice; half of it twice is what the factors say."""
    wrapped.base_model.model.body["attn"].base_layer.out_proj.scaling["default"] /= 2
    return wrapped


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_torchs_attention_and_grouped_convolutions(tmp_path: Path):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    module: Any = Attending()
    wrapped: Any = get_peft_model(module, LoraConfig(r=4, target_modules=["attn", "conv"])).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    once(wrapped)
    model = Attending().eval()
    gs.attach(model, gs.Adapter.load(tmp_path / "theirs"))
    assert (model(x) - wrapped(x)).abs().max() <= 1e-5
    gs.capture(model).save(tmp_path / "ours")
    assert same_tensors(tmp_path / "theirs", tmp_path / "ours")
    again = once(PeftModel.from_pretrained(Attending(), str(tmp_path / "ours")).eval())
    assert (again(x) - wrapped(x)).abs().max() <= 1e-5


def test_vera_without_its_projections(toy: Toys, tmp_path: Path):
    """The seed says what they are; saved from a model, they are in the file, and the config says so."""
    config = VeraConfig(r=3, target_modules=["q_proj", "v_proj"], save_projection=False, projection_prng_key=11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(toy("llama"), config).eval()
        for name, parameter in wrapped.named_parameters():
            if "vera_lambda" in name:
                parameter.data += 0.5
        wrapped.save_pretrained(str(tmp_path / "theirs"))
    adapter = gs.Adapter.load(tmp_path / "theirs")
    assert "" not in adapter.tensors
    model = toy("llama")
    gs.attach(model, adapter)
    assert (logits(model) - logits(wrapped)).abs().max() <= 1e-5
    adapter.save(tmp_path / "ours")
    assert same_tensors(tmp_path / "theirs", tmp_path / "ours")
    gs.capture(model).save(tmp_path / "whole")
    assert {"base_model.vera_A", "base_model.vera_B"} <= tensors_of(tmp_path / "whole").keys()
    assert (logits(peft_loads(toy("llama"), tmp_path / "whole")) - logits(wrapped)).abs().max() <= 1e-5


# Mixtures of experts before transformers 5 ---------------------------------------------------------------------------

OLD = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}


def old_file(name: str, folder: Path, **fields: Any) -> dict[str, Tensor]:
    """Factors for every matrix of every expert, and for the queries, under the names of then."""
    block, gate, up, down = OLD[name]
    draw, inner = torch.Generator().manual_seed(2), 96 if name == "mixtral" else 48
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        modules = {"self_attn.q_proj": (64, 64)}
        for expert in range(4):
            modules |= {f"{block}.experts.{expert}.{matrix}": (inner, 64) for matrix in (gate, up)}
            modules[f"{block}.experts.{expert}.{down}"] = (64, inner)
        for module, (outer, width) in modules.items():
            path = f"model.layers.{layer}.{module}"
            tensors[f"{path}.lora_A.weight"] = 0.2 * torch.randn(3, width, generator=draw)
            tensors[f"{path}.lora_B.weight"] = 0.2 * torch.randn(outer, 3, generator=draw)
    targets = ["q_proj", gate, up, down]
    written(folder, tensors, **({"r": 3, "lora_alpha": 5, "target_modules": targets} | fields))
    return tensors


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("name", OLD)
def test_single_experts_of_old(name: str, scaling: str, toy: Toys, tmp_path: Path):
    """The change of each expert's matrices is what its own factors say; PEFT computes the same logits."""
    old = old_file(name, tmp_path / "old", use_rslora=scaling == "rslora")
    with pytest.warns(UserWarning, match="transformers 5"):
        adapter = gs.Adapter.load(tmp_path / "old")
    model = toy(name)
    gs.attach(model, adapter)
    attached = logits(model)
    block, gate, up, down = OLD[name]
    factor = 5 / 3 if scaling == "standard" else 5 / 3**0.5
    before = {key: value.clone() for key, value in toy(name).state_dict().items()}
    gs.merge(model)
    after = {key: value for key, value in model.state_dict().items() if ".gossamer" not in key}
    for layer in range(2):
        for expert in range(4):
            changes = []
            for matrix in (gate, up, down):
                path = f"model.layers.{layer}.{block}.experts.{expert}.{matrix}"
                inner, outer = (old[f"{path}.lora_{side}.weight"].double() for side in "AB")
                changes.append(factor * torch.einsum("or,ri->oi", outer, inner))
            for stacked, expected in (("gate_up_proj", torch.cat(changes[:2])), ("down_proj", changes[2])):
                key = f"model.layers.{layer}.mlp.experts.{stacked}"
                assert ((after[key] - before[key])[expert] - expected).abs().max() <= 1e-5
    if scaling == "standard":  # PEFT doubles alpha for the fused matrix with rslora too, where sqrt(2) would be right
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = PeftModel.from_pretrained(toy(name), str(tmp_path / "old")).eval()
        assert (logits(theirs) - attached).abs().max() <= 1e-4
    adapter.save(tmp_path / "new")
    assert gs.Adapter.load(tmp_path / "new") == adapter
    with warnings.catch_warnings():  # PEFT looks for patterns of parameters among modules, and says that there are none
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys|`is_gradient_checkpointing`")
        again = PeftModel.from_pretrained(toy(name), str(tmp_path / "new")).eval()
    assert (logits(again) - attached).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        ("experts.3.w1.", "experts without factors for gate"),
        (".w3.", "gate and up are one"),
        ("experts.0.w1.lora_A", "other tensors"),
    ],
)
def test_experts_that_lack_something(lost: str, text: str, tmp_path: Path):
    old = old_file("mixtral", tmp_path)
    kept = {name: value for name, value in old.items() if lost not in name}
    written(tmp_path, kept, r=3, lora_alpha=5, target_modules=["q_proj", "w1", "w2", "w3"])
    with pytest.raises(AdapterFileError, match=text):
        gs.Adapter.load(tmp_path)


def test_patterns_of_single_experts(tmp_path: Path, toy: Toys):
    """Patterns that named the old matrices go over into the stacked ones; the others stay."""
    old_file("mixtral", tmp_path, alpha_pattern={"w2": 2, "q_proj": 7})
    with pytest.warns(UserWarning, match="transformers 5"):
        spec: Any = gs.Adapter.load(tmp_path).spec
    path = "model.layers.1.mlp.experts"
    assert [spec.rank_at(f"{path}.{name}") for name in ("gate_up_proj", "down_proj")] == [6, 3]
    assert spec.scaling_at(f"{path}.gate_up_proj") == pytest.approx(5 / 3)
    assert spec.scaling_at(f"{path}.down_proj") == pytest.approx(2 / 3)
    assert spec.scaling_at("model.layers.0.self_attn.q_proj") == pytest.approx(7 / 3)
    gs.attach(toy("mixtral"), gs.LoRA(**{name: getattr(spec, name) for name in type(spec).model_fields}))


def test_our_own_file_of_single_experts_stays_as_it_is(tmp_path: Path):
    """A model that does have one module an expert: our description says so."""
    model = nn.ModuleDict(
        {"mlp": nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(3, 3)})])})}
    )
    gs.attach(model, gs.LoRA(r=2))
    adapter = gs.capture(model)
    assert gs.Adapter.load(adapter.save(tmp_path)) == adapter


def test_wrappers_that_cannot_be_told_apart(tmp_path: Path):
    factors = {"lora_A.weight": torch.ones(4, 3), "lora_B.weight": torch.ones(3, 4)}
    tensors = {
        f"m.experts.{level}{name}": value.clone() for level in ("", "base_layer.") for name, value in factors.items()
    }
    config = {"r": 2, "lora_alpha": 2, "target_modules": []}
    written(tmp_path, tensors, target_parameters=["experts.left", "experts.right"], **config)
    with pytest.raises(UnsupportedError, match="order in which it declares"):
        gs.Adapter.load(tmp_path)
    written(tmp_path, tensors, target_parameters=["experts.down_proj"], **config)
    with pytest.raises(AdapterFileError, match="does not name"):
        gs.Adapter.load(tmp_path)
