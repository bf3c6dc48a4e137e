"""The one table of model families: what running, converting, planning and training know of one beside its config.

A family is a `model_type` of transformers; SmolLM and many others are Llamas by type. What is not listed still loads,
trains and serves by the model's own forward: an entry only opens a fast way, or a way to another tool's file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEEDFORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one family of decoders has of its own.

    Attributes:
        packable: its tokens meet nowhere but in attention, and it takes `position_ids`, so rows can be packed.
        layer: class of its decoder layers where those are written out as fused and as cached ones; else empty.
        offset: its norms scale by `1 + weight`.
        window: its attention looks back as the config says; else as its attention module says, if it does.
        gguf: llama.cpp's name of the architecture that computes the same; empty where none is known to.
        gguf_modules: linear modules of a layer that it and transformers both have.
        gguf_pairs: llama.cpp holds its query and key rows in rotated pairs instead of halves.
        gguf_model: whole models are written for llama.cpp, and not adapters alone.
        torchtune_pairs: whether torchtune holds those rows in pairs; None where that is not known.
    """

    packable: bool = False
    layer: str = ""
    offset: bool = False
    window: bool = False
    gguf: str = ""
    gguf_modules: tuple[str, ...] = (*ATTENTION, *FEEDFORWARD)
    gguf_pairs: bool = False
    gguf_model: bool = False
    torchtune_pairs: bool | None = None


_PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        packable=True, layer="LlamaDecoderLayer", gguf="llama", gguf_pairs=True, gguf_model=True, torchtune_pairs=True
    ),
    "mistral": Family(
        packable=True,
        layer="MistralDecoderLayer",
        window=True,
        gguf="llama",
        gguf_pairs=True,
        gguf_model=True,
        torchtune_pairs=True,
    ),
    "granite": Family(gguf="granite", gguf_pairs=True),
    "qwen2": Family(packable=True, layer="Qwen2DecoderLayer", gguf="qwen2", gguf_model=True, torchtune_pairs=False),
    "qwen3": Family(packable=True, layer="Qwen3DecoderLayer", gguf="qwen3", gguf_model=True),
    "qwen3_moe": Family(gguf="qwen3moe", gguf_modules=ATTENTION),
    "gemma": Family(packable=True, layer="GemmaDecoderLayer", offset=True, gguf="gemma"),
    "gemma2": Family(gguf="gemma2"),
    "gemma3_text": Family(gguf="gemma3"),
    "olmo2": Family(gguf="olmo2"),
    "phi3": Family(gguf="phi3", gguf_modules=_PHI3),
    "mixtral": Family(packable=True),
    "gpt2": Family(packable=True),
    "gpt_neox": Family(packable=True),
    "opt": Family(packable=True),
    "phi": Family(packable=True),
}
"""`model_type` -> family."""

LAYERS: Mapping[str, Family] = {one.layer: one for one in FAMILIES.values() if one.layer}
"""Class of a decoder layer that is written out -> family."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_SPLITS: Mapping[str, str] = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
"""How a tokenizer cuts text before its bytes are paired -> llama.cpp's name for that."""


def rate_exponent(model_type: str) -> float:
    """How the best learning rate of LoRA falls with the hidden size: `(2000 / hidden) ** p`.

    Source: Schulman et al. 2025, "LoRA Without Regret", and its cookbook: Qwen has one of its own, others Llama's.
    """
    return 0.0775 if model_type.startswith("qwen") else 0.781
