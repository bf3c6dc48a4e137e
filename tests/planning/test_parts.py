"""Models of several parts: everything is counted, or the plan says that it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gossamer as gs
from gossamer.errors import UnsupportedError
from gossamer.models import load_base, tiny, tiny_tokenizer, write_model_folder
from gossamer.models.stored import storage
from gossamer.planning import plan
from gossamer.planning.source import shape_of

TEXT: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 96, "vocab_size": 320, "max_position_embeddings": 64, "pad_token_id": 0}
SEEING: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SEEING |= {"image_size": 16, "patch_size": 4}
QWEN: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
HEARING: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
ROTATED = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}


def of(text: str, other: str, sizes: dict[str, Any], part: str = "vision", **fields: Any) -> dict[str, Any]:
    """A config of a language model of one type and a tower of another; "" for the family's own."""
    inner = TEXT | ({"model_type": text} if text else {})
    return {"text_config": inner, f"{part}_config": sizes | ({"model_type": other} if other else {})} | fields


CLIP, SIGLIP, GEMMA = "clip_vision_model", "siglip_vision_model", {"head_dim": 16}
QWEN2 = QWEN | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
QWEN25 = QWEN | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("LlavaForConditionalGeneration", of("llama", CLIP, SEEING)),
    "llava_mistral": ("LlavaForConditionalGeneration", of("mistral", SIGLIP, SEEING)),
    "llava_tied": ("LlavaForConditionalGeneration", of("qwen2", CLIP, SEEING, tie_word_embeddings=True)),
    "gemma3": ("Gemma3ForConditionalGeneration", of("", SIGLIP, SEEING, mm_tokens_per_image=4)),
    "paligemma": ("PaliGemmaForConditionalGeneration", of("gemma", SIGLIP, SEEING, projection_dim=64)),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", of("", "", QWEN2)),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", of("", "", QWEN25)),
    "mistral3": ("Mistral3ForConditionalGeneration", of("mistral", "pixtral", SEEING | {"head_dim": 8})),
    "idefics3": ("Idefics3ForConditionalGeneration", of("llama", "", SEEING)),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", of("qwen2", "qwen2_audio_encoder", HEARING, "audio")),
}
for _name, _change in (("gemma3", GEMMA), ("paligemma", GEMMA), ("qwen2_vl", ROTATED), ("qwen2_5_vl", ROTATED)):
    KINDS[_name][1]["text_config"].update(_change)

QUICK = ("llava", "gemma3", "qwen2_5_vl", "qwen2_audio")
EACH = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def built(kind: str, device: str = "meta") -> Any:
    name, fields = KINDS[kind]
    made: Any = getattr(transformers, name)
    torch.manual_seed(0)
    with torch.device(device):
        return made(made.config_class(**fields))


@pytest.mark.parametrize("kind", EACH)
def test_the_plan_counts_the_whole_model(kind: str, tmp_path: Path):
    model = built(kind)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    found = plan(tmp_path, gs.LoRA(r=4), sequence=32)
    assert found.shape.total == sum(parameter.numel() for parameter in model.parameters())
    assert found.memory.weights == 2 * found.shape.total
    assert sum(found.parameters.values()) == found.shape.total
    text = str(found)
    for part in found.shape.towers:
        assert part.parameters > 0
        assert f"{part.name} ({part.parameters:,})" in text
    for linear in found.shape.linears:
        assert model.get_submodule(found.shape.path(linear, 1)).weight.shape == (linear.outer, linear.inner)
    full = plan(tmp_path, "full", sequence=32)
    assert full.trainable == gs.attach(built(kind, "cpu"), gs.FullTuning()).trainable  # which leaves towers alone


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_what_is_trained_at_the_language_model_is_what_attach_trains(kind: str):
    model = built(kind, "cpu")
    spec = gs.LoRA(r=4, target_modules=r"model\.language_model\..*_proj")
    trained = gs.attach(model, spec).trainable
    config = model.config.to_dict()
    assert plan(config, spec, sequence=32).trainable == plan(config, gs.LoRA(r=4), sequence=32).trainable == trained


@pytest.mark.parametrize("kind", EACH)
def test_all_linear_is_the_language_model_of_plan_and_attach_alike(kind: str):
    model, spec = built(kind, "cpu"), gs.LoRA(r=4, target_modules="all-linear")
    model.config.architectures = [type(model).__name__]
    trained = gs.attach(model, spec).trainable
    assert plan(model.config.to_dict(), spec, sequence=32).trainable == trained


def test_adapters_in_a_tower_are_refused_by_name():
    config = built("llava").config.to_dict()
    for targets in (("q_proj",), r".*_proj"):
        with pytest.raises(UnsupportedError, match="another part") as refused:
            plan(config, gs.LoRA(r=4, target_modules=targets), sequence=32)
        assert "vision_tower" in str(refused.value)


def test_what_cannot_be_counted_is_refused_and_not_half_counted():
    config = built("llava").config.to_dict()
    for change in ({"model_type": "a-model-of-tomorrow"}, {"text_config": config["text_config"] | {"hidden_size": 65}}):
        with pytest.raises(UnsupportedError):
            shape_of(config | change)


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
@pytest.mark.parametrize("kind", ["llava", "mixtral", "qwen3_moe", "llama"])
def test_the_base_takes_what_loading_it_takes(kind: str, quant: str | None, tmp_path: Path):
    model = built(kind, "cpu") if kind in KINDS else tiny(kind)
    base = write_model_folder(model, tiny_tokenizer(), tmp_path / "base")
    loaded = load_base(base, quant=quant, dtype="float32")[0]
    planned = plan(base, gs.LoRA(r=4), quant=quant, sequence=32, dtype="float32")
    assert planned.memory.weights == storage(loaded).nbytes
    said = "stacked experts" in str(planned)
    assert said == (quant is not None and kind in ("mixtral", "qwen3_moe"))
