"""Roles told from names: complete on every toy, silent about heads, cautious with names that could mean two things."""

from __future__ import annotations

import re

import pytest
from torch import nn

from gossamer.methods.roles import role_of
from gossamer.models import tiny

ATTENTION = {"query", "key", "value", "attention-output"}
FUSED = {"fused", "attention-output"}
FEEDFORWARD = {"feedforward-input", "feedforward-output"}
EXPECTED = dict.fromkeys(("llama", "mistral", "gemma", "gemma3", "qwen2", "phi", "opt"), ATTENTION | FEEDFORWARD)
EXPECTED |= dict.fromkeys(("t5", "bart", "bert", "bert_mlm", "roberta", "deberta_v2"), ATTENTION | FEEDFORWARD)
EXPECTED |= dict.fromkeys(("vit", "clip", "whisper", "llama_classifier"), ATTENTION | FEEDFORWARD)
EXPECTED |= dict.fromkeys(("falcon", "bloom", "gpt2", "gpt_neox"), FUSED | FEEDFORWARD)
EXPECTED |= dict.fromkeys(("mixtral", "qwen3_moe"), ATTENTION)  # their experts are no linear modules


@pytest.mark.parametrize("architecture", EXPECTED)
def test_every_linear_module_of_a_layer_has_a_role_and_nothing_else_has_one(architecture: str):
    model = tiny(architecture)
    linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    inside = [path for path in linear if re.search(r"\.\d+\.", path)]
    assert {role_of(path) for path in inside} == EXPECTED[architecture]
    assert {role_of(path) for path in linear if path not in inside} <= {None}


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("transformer.h.0.attn.c_proj", "attention-output"),
        ("transformer.h.0.mlp.c_proj", "feedforward-output"),
        ("transformer.h.0.attn.attention.out_proj", "attention-output"),
        ("transformer.h.0.mlp.fc_out", "feedforward-output"),
        ("decoder.block.0.layer.1.EncDecAttention.o", "attention-output"),
        ("decoder.block.0.layer.2.DenseReluDense.wo", "feedforward-output"),
        ("model.layers.0.attention.wo", "attention-output"),
        ("model.layers.0.attention.wqkv", "fused"),
        ("model.layers.0.self_attn.qkv_proj", "fused"),
        ("model.layers.0.mlp.gate_up_proj", "feedforward-input"),
        ("distilbert.transformer.layer.0.attention.out_lin", "attention-output"),
        ("distilbert.transformer.layer.0.ffn.lin2", "feedforward-output"),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense", "attention-output"),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output", "feedforward-output"),
        ("encoder.layer.0.crossattention.output.dense", "attention-output"),
        ("encoder.layer.0.attention.attn.q", "query"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", "attention-output"),
        ("layers.0.linear2", "feedforward-output"),
        ("q_proj", "query"),
        ("classifier.out_proj", None),
        ("backbone.layers.0.mixer.out_proj", None),
        ("backbone.layers.0.mixer.in_proj", None),
        ("key", None),
        ("model.layers.0.self_attn.kv_proj", None),  # ends like a name, but not after a dot
        ("dense", None),
        ("lm_head", None),
        ("model.layers.0.mlp.gate", None),
    ],
)
def test_names(path: str, role: str | None):
    assert role_of(path) == role
