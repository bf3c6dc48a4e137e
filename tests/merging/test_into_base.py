"""Merging into a base on disk: equal outputs, nothing half-written, refusals that leave nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gossamer as gs
from gossamer.errors import AdapterFileError, BaseMismatchError, SharedWeightError, StateError
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
    frozen = tiny("llama").get_submodule(path).weight.data.bfloat16().float()
    assert torch.equal(plain.get_submodule(path).weight.data, (frozen + adapter.delta(path)).bfloat16())


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
