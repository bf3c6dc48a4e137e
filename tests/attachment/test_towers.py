"""Models with towers for images beside their language model: what "all-linear" and an excluded tower mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

import gossamer as gs
from gossamer.errors import TargetError
from gossamer.methods import FullTuning, TargetedMethod
from tests.adapters import shaken, tokens

_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
_IMAGE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48} | {
    "image_size": 16,
    "patch_size": 8,
}


def gemma() -> nn.Module:
    config = Gemma3Config(text_config=_TEXT, vision_config=_IMAGE, mm_tokens_per_image=4, image_token_index=300)
    return Gemma3ForConditionalGeneration(config)


def llava() -> nn.Module:
    text, image = _TEXT | {"model_type": "llama"}, _IMAGE | {"model_type": "clip_vision_model"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=image, image_token_index=300))


def seeing(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def sites(model: nn.Module, spec: TargetedMethod) -> list[str]:
    found = [site.path for site in gs.attach(model, spec).sites]
    gs.detach(model)
    return found


each_model = pytest.mark.parametrize("build", [gemma, llava])
TOWERS = ("vision_tower", "multi_modal_projector")


@each_model
@pytest.mark.parametrize("spec", [gs.LoRA(r=2), FullTuning()], ids=["lora", "full"])
def test_all_means_what_text_reaches(build: Callable[[], nn.Module], spec: TargetedMethod):
    model = seeing(build)
    report = gs.attach(model, spec)
    assert report.sites
    assert not any(tower in site.path for site in report.sites for tower in TOWERS)
    assert "text does not reach it" in str(report)
    shaken(model, "default", 0.05)
    model(input_ids=tokens()).logits.sum().backward()
    trained = gs.trainable_parameters(model)
    assert all(parameter.grad is not None for parameter in trained.values())


@each_model
def test_a_tower_that_is_named(build: Callable[[], nn.Module]):
    model = seeing(build)
    assert any("vision_tower" in path for path in sites(model, gs.LoRA(r=2, target_modules=("q_proj",))))
    assert all("vision_tower" in path for path in sites(model, gs.LoRA(r=2, target_modules=r".*vision_tower.*q_proj")))


@each_model
def test_a_module_that_holds_others_is_excluded_with_them(build: Callable[[], nn.Module]):
    model = seeing(build)
    for excluded in (("vision_tower",), r".*\.vision_tower"):
        found = sites(model, gs.LoRA(r=2, target_modules=("q_proj",), exclude_modules=excluded))
        assert found
        assert not any("vision_tower" in path for path in found)
    everything = sites(model, gs.LoRA(r=2))
    assert sites(model, gs.LoRA(r=2, exclude_modules=TOWERS)) == everything, "they are left out by themselves"
    with pytest.raises(TargetError, match="vision_towr"):
        gs.attach(model, gs.LoRA(r=2, exclude_modules=("vision_towr",)))
    without = sites(model, gs.LoRA(r=2, exclude_modules=("mlp",)))
    assert without == [path for path in everything if ".mlp." not in path]


@each_model
def test_a_stored_adapter_keeps_what_it_has(build: Callable[[], nn.Module]):
    """One that was made when "all-linear" meant the towers too, or by a tool that excludes named modules alone."""
    model = seeing(build)
    gs.attach(model, gs.LoRA(r=2, target_modules=("q_proj", "v_proj")))
    shaken(model, "default")
    adapter = gs.capture(model)
    gs.detach(model)
    assert any("vision_tower" in path for path in adapter.paths)
    spec = adapter.spec.replace(exclude_modules=("vision_tower",))
    gs.attach(model, gs.Adapter(spec, adapter.tensors))
    assert gs.capture(model).tensors.keys() == adapter.tensors.keys()


def test_models_without_a_language_model_are_as_they_were(toy: Callable[[str], nn.Module]):
    for name in ("vit", "clip", "whisper", "bert", "t5"):
        assert "leaves out" not in str(gs.attach(toy(name), gs.LoRA(r=2)))
