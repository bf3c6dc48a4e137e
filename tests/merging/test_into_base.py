"""Merging into a base on disk: equal outputs, nothing half-written, refusals that leave nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gossamer as gs
from gossamer.errors import AdapterFileError, BaseMismatchError, SharedWeightError, StateError, UsageError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from tests.adapters import tokens, trained

SPECS = {
    "plain": gs.LoRA(r=4),
    "norms and biases": gs.LoRA(r=2, bias="all", modules_to_save=("norm",), scaling="rslora"),
    "some": gs.LoRA(r=3, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 5}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tiny("llama"), tiny_tokenizer(), tmp_path_factory.mktemp("bases") / "llama")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_folder_is_the_adapted_model(spec: gs.LoRA, base: Path, tmp_path: Path):
    model = tiny("llama")
    trained(model, spec).save(tmp_path / "adapter")
    done = gs.merge_into_base(tmp_path / "adapter", base, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-4)
    assert done["max_error"] <= 1e-4 < done["max_logit"]
    assert done["modules"] == len(gs.Adapter.load(tmp_path / "adapter").paths)


def test_bfloat16_is_rounded_once(base: Path, tmp_path: Path):
    model = tiny("llama")
    adapter = trained(model, gs.LoRA(r=4, target_modules=("q_proj",)))
    adapter.save(tmp_path / "adapter")
    done = gs.merge_into_base(tmp_path / "adapter", base, tmp_path / "merged", dtype="bf16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert done["dtype"] == "bfloat16"
    path = adapter.paths[0]
    exact = tiny("llama").get_submodule(path).weight.data.double() + adapter.delta(path).double()
    steps = torch.finfo(torch.bfloat16).eps * exact.abs().log2().floor().exp2()
    assert ((plain.get_submodule(path).weight.data.double() - exact).abs() <= 0.5001 * steps).all()


def test_refusals_leave_nothing(base: Path, tmp_path: Path):
    output = tmp_path / "merged"
    trained(tiny("llama"), gs.LoRA(r=4)).save(tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    with pytest.raises(StateError, match="exists"):
        gs.merge_into_base(tmp_path / "adapter", base, tmp_path / "there")
    with pytest.raises(AdapterFileError, match="cannot read"):
        gs.merge_into_base(tmp_path / "nowhere", base, output)

    trained(tiny("llama", seed=3), gs.LoRA(r=4)).save(tmp_path / "stranger")
    with pytest.raises(BaseMismatchError, match="another base"):
        gs.merge_into_base(tmp_path / "stranger", base, output)

    tied = tiny("llama", tie_word_embeddings=True)
    write_model_folder(tied, tiny_tokenizer(), tmp_path / "tied")
    trained(tied, gs.LoRA(r=4, target_modules=("lm_head",))).save(tmp_path / "head")
    with pytest.raises(SharedWeightError):
        gs.merge_into_base(tmp_path / "head", tmp_path / "tied", output)
    assert not output.exists()
    assert gs.merge_into_base(tmp_path / "stranger", base, output, force_base=True)["modules"] == 14


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_quantised_base_is_merged_dense_and_every_choice_is_measured(kind: str, tmp_path: Path):
    base = write_model_folder(tiny(kind), tiny_tokenizer(), tmp_path / "base")
    model, _ = gs.load_base(base, quant="nf4")
    trained(model, gs.LoRA(r=4)).save(tmp_path / "adapter")
    done = gs.merge_into_base(tmp_path / "adapter", base, tmp_path / "merged", quant="nf4")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-4)
    assert (done["dtype"], done["max_error"] < 1e-4) == ("float32", True)
    choices = done["choices"]
    assert choices["float32"] == {"of_weight": 0.0, "of_change": 0.0}
    assert (
        0 < choices["bfloat16"]["of_weight"] < 0.004 < choices["int8"]["of_weight"] < choices["nf4"]["of_weight"] < 0.2
    )
    path = "model.layers.0.self_attn.q_proj" if kind == "llama" else "transformer.h.0.attn.c_attn"
    before, delta = model.get_submodule(path).weight.detach(), gs.capture(model).delta(path)
    merged = plain.get_submodule(path).weight.data
    assert torch.equal(merged if kind == "llama" else merged.T, before + delta)


def test_what_requantising_loses_is_what_it_says(base: Path, tmp_path: Path):
    model, _ = gs.load_base(base, quant="nf4")
    adapter = trained(model, gs.LoRA(r=4, target_modules=("q_proj",)))
    adapter.save(tmp_path / "adapter")
    done = gs.merge_into_base(tmp_path / "adapter", base, tmp_path / "merged", quant="nf4", requantize=True)
    merged, _ = gs.load_base(tmp_path / "merged")
    lost = weight = change = 0.0
    for path in adapter.paths:
        module = merged.get_submodule(path)
        assert module.runs_packed
        before = model.get_submodule(path).weight.detach()
        wanted = before + adapter.delta(path)
        lost += (module.weight - wanted).square().sum().item()
        weight, change = weight + wanted.square().sum().item(), change + (wanted - before).square().sum().item()
    said = done["choices"]["nf4"]
    assert said["of_weight"] == pytest.approx((lost / weight) ** 0.5, rel=1e-4)
    assert said["of_change"] == pytest.approx((lost / change) ** 0.5, rel=1e-4)
    untouched = "model.layers.0.mlp.up_proj"
    assert torch.equal(merged.get_submodule(untouched).codes, model.get_submodule(untouched).codes)


def test_only_a_quantised_base_can_be_requantised(base: Path, tmp_path: Path):
    trained(tiny("llama"), gs.LoRA(r=4)).save(tmp_path / "adapter")
    with pytest.raises(UsageError, match="quantised again"):
        gs.merge_into_base(tmp_path / "adapter", base, tmp_path / "merged", requantize=True)
    assert not (tmp_path / "merged").exists()
