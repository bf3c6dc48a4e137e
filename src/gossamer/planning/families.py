"""A transformers config.json as a `ModelShape`, with each family's defaults for what the file leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gossamer.errors import BaseFileError, UnsupportedError, nearest
from gossamer.planning.parts import composite, parts_of
from gossamer.planning.shape import ModelShape

Config = Mapping[str, Any]
FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""Types of models whose layers are in `models.blocks`."""
_READ_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Language models of several parts -> the type that has the same parameters."""
_BIASED = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}


def shape_of_config(config: Config, name: str = "") -> ModelShape:
    """The numbers of a model.

    Args:
        config: the content of a config.json; of a model of several parts its language model is read, and the others
            are counted.
        name: what to call it.

    Raises: UnsupportedError for an architecture that is not known; BaseFileError for numbers that are missing.
    """
    if composite(config):
        return _of_parts(config, name)
    kind = str(config.get("model_type", ""))
    if kind not in READERS:
        known = ", ".join(READERS)
        raise UnsupportedError(
            "the plan does not know this architecture", where=name, got=kind or "no model_type", expected=known,
            hint=nearest(kind, READERS) or "type the numbers in: layers, hidden, heads, vocabulary, intermediate",
        )  # fmt: skip
    try:
        fields = READERS[kind](config)
        fields["blocks"] = kind in FUSED
        fields.setdefault("dtype", str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
        return ModelShape(name or kind, **fields)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BaseFileError(
            "the config lacks a number", where=name, got=str(error), expected="a whole config"
        ) from None


def _of_parts(config: Config, name: str) -> ModelShape:
    """A language model with towers beside it, its count held to transformers' own."""
    found = parts_of(config, name)
    text = dict(found.text)
    text["model_type"] = _READ_AS.get(str(text.get("model_type")), text.get("model_type"))
    stored = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16")
    shape = replace(
        shape_of_config(text, name or str(config.get("model_type"))),
        tied=found.tied,
        dtype=stored,
        root=found.layers,
        parts=found.others,
        blocks=False,
    )
    if shape.language != found.language:
        raise UnsupportedError(
            "the plan does not know this language model well enough: it counts other parameters than transformers",
            where=name,
            got=f"{text['model_type']}: {shape.language:,}",
            expected=f"{found.language:,}",
        )
    return shape


def _decoder(config: Config) -> dict[str, Any]:
    """What most configs call alike."""
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocabulary": config["vocab_size"],
        "intermediate": config["intermediate_size"],
        "activation": config.get("hidden_act", "silu"),
        "tied": config.get("tie_word_embeddings", False),
        "rotary": float(config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))),
    }


def _llama(config: Config) -> dict[str, Any]:
    bias = config.get("attention_bias", False)
    return _decoder(config) | {"qkv_bias": bias, "output_bias": bias, "mlp_bias": config.get("mlp_bias", False)}


def _qwen2(config: Config) -> dict[str, Any]:
    return _decoder(config) | {"qkv_bias": True}


def _qwen3(config: Config) -> dict[str, Any]:
    return _llama(config) | {"head_norm": True, "head_dim": config.get("head_dim", 128)}


def _gemma(config: Config) -> dict[str, Any]:
    tied = config.get("tie_word_embeddings", True)
    named = config.get("hidden_activation") or "gelu_pytorch_tanh"
    fields = {"norm": "offset", "tied": tied, "head_dim": config.get("head_dim", 256), "activation": named}
    return _llama(config) | fields


def _gemma2(config: Config) -> dict[str, Any]:
    return _gemma(config) | {"norms": 4}


def _gemma3(config: Config) -> dict[str, Any]:
    return _gemma(config) | {"norms": 4, "head_norm": True}


def _phi3(config: Config) -> dict[str, Any]:
    return _decoder(config) | {"fused": True, "fused_gate": True}


def _mixtral(config: Config) -> dict[str, Any]:
    experts, active = config.get("num_local_experts", 8), config.get("num_experts_per_tok", 2)
    return _decoder(config) | {"experts": experts, "active": active}


def _qwen3_moe(config: Config) -> dict[str, Any]:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UnsupportedError("the plan knows only models whose layers are all alike", got="layers without experts")
    fields = {
        "intermediate": config["moe_intermediate_size"],
        "experts": config.get("num_experts") or config.get("num_local_experts", 128),
    }
    return _qwen3(config) | fields | {"active": config.get("num_experts_per_tok", 8)}


def _gpt2(config: Config) -> dict[str, Any]:
    hidden = config["n_embd"]
    return _BIASED | {
        "family": "gpt2", "layers": config["n_layer"], "hidden": hidden, "heads": config["n_head"],
        "vocabulary": config["vocab_size"], "intermediate": config.get("n_inner") or 4 * hidden, "gated": False,
        "activation": config.get("activation_function", "gelu_new"), "norm": "layer", "fused": True, "rotary": 0.0,
        "positions": config.get("n_positions", 1024), "tied": config.get("tie_word_embeddings", True),
    }  # fmt: skip


def _opt(config: Config) -> dict[str, Any]:
    hidden = config["hidden_size"]
    if config.get("word_embed_proj_dim", hidden) != hidden or not config.get("do_layer_norm_before", True):
        raise UnsupportedError("the plan does not know OPT with a projected embedding or norms behind its blocks")
    bias = config.get("enable_bias", True)
    return {
        "family": "opt", "layers": config["num_hidden_layers"], "hidden": hidden,
        "heads": config["num_attention_heads"], "vocabulary": config["vocab_size"], "intermediate": config["ffn_dim"],
        "gated": False, "activation": config.get("activation_function", "relu"), "norm": "layer", "rotary": 0.0,
        "positions": config.get("max_position_embeddings", 2048) + 2, "tied": config.get("tie_word_embeddings", True),
        "qkv_bias": bias, "output_bias": bias, "mlp_bias": bias,
    }  # fmt: skip


def _gpt_neox(config: Config) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    bias = config.get("attention_bias", True)
    return _decoder(config) | _BIASED | {
        "family": "gpt_neox", "gated": False, "activation": config.get("hidden_act", "gelu"), "norm": "layer",
        "fused": True, "parallel": config.get("use_parallel_residual", True), "qkv_bias": bias, "output_bias": bias,
        "rotary": float(config.get("rotary_pct", rope.get("partial_rotary_factor", 0.25))),
    }  # fmt: skip


def _falcon(config: Config) -> dict[str, Any]:
    new, hidden = config.get("new_decoder_architecture", False), config["hidden_size"]
    if config.get("alibi") or not (new or config.get("parallel_attn", True)):
        raise UnsupportedError("the plan does not know Falcon with alibi, or with its blocks one after the other")
    heads, bias = config["num_attention_heads"], config.get("bias", False)
    keys = config.get("num_kv_heads") if new else (1 if config.get("multi_query", True) else heads)
    return {
        "family": "falcon", "layers": config["num_hidden_layers"], "hidden": hidden, "heads": heads,
        "kv_heads": keys or heads, "vocabulary": config["vocab_size"], "activation": "gelu", "gated": False,
        "intermediate": config.get("ffn_hidden_size") or 4 * hidden, "norm": "layer", "fused": True, "parallel": True,
        "norms": (config.get("num_ln_in_parallel_attn") or 2) if new else 1, "qkv_bias": bias, "output_bias": bias,
        "mlp_bias": bias, "tied": config.get("tie_word_embeddings", True),
    }  # fmt: skip


def _bert(config: Config) -> dict[str, Any]:
    return _decoder(config) | _BIASED | {
        "family": "bert", "gated": False, "activation": config.get("hidden_act", "gelu"), "norm": "layer", "tied": True,
        "rotary": 0.0, "positions": config["max_position_embeddings"], "types": config.get("type_vocab_size", 2),
        "encoder": True,
    }  # fmt: skip


READERS: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _decoder,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "bert": _bert,
    "roberta": _bert,
}
"""`model_type` of a config -> how it is read."""
