"""Files of ours that PEFT does not read as they stand: the rule is PEFT's own, for every architecture there is."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft.utils import transformers_weight_conversion as pefts
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.auto import modeling_auto

import gossamer as gs
from gossamer.files.misread import expert_names
from tests.adapters import trained
from tests.conformance.oracle import Toys

MODELS = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_the_names_are_those_that_pefts_config_follows():
    for kind, architecture in MODELS.items():
        style = pefts._MODEL_TO_CONVERSION_PATTERN.get(kind, "")
        assert expert_names(architecture) == set(pefts._MOE_TARGET_MODULE_MAPPING.get(style, {})), kind
    assert expert_names("NobodysForCausalLM") == set()


def deepseek() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": 64, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8}
    sizes |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "topk_group": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, pad_token_id=0)).eval()


def test_saving_says_which_modules_peft_would_drop(tmp_path: Path):
    value = trained(deepseek(), gs.LoRA(r=2))
    with pytest.warns(UserWarning, match=r"PEFT 0.21 takes 6 of the \d+ adapted modules .*layers.0.mlp.down_proj"):
        value.save(tmp_path / "all")
    assert gs.Adapter.load(tmp_path / "all") == value


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral"])
def test_saving_says_nothing_where_peft_reads_right(name: str, toy: Toys, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(toy(name), gs.LoRA(r=2, target_modules=("q_proj", "v_proj"))).save(tmp_path / "attention")
        if name == "llama":
            trained(toy(name), gs.LoRA(r=2), seed=1).save(tmp_path / "all")
        attention = gs.LoRA(r=2, target_modules=("q_b_proj", "o_proj"))
        trained(deepseek(), attention).save(tmp_path / "deepseek")
