"""Toys of many architectures, one layer or two and width 32, for the law that attached equals merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PLAIN = {name: value for name, value in _TEXT.items() if name not in ("num_key_value_heads", "head_dim")}
_SEES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48} | {
    "image_size": 16,
    "patch_size": 8,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_STACKS = {"d_model": 32, "vocab_size": 96, "pad_token_id": 0, "decoder_start_token_id": 1} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4} | {
    "vocab_size": 96,
    "decoder_start_token_id": 0,
}
_WAVES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48} | {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}

TEXT, IMAGE, SOUND, WAVE, BOTH = "text", "image", "sound", "wave", "text to text"

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # decoders
    "LlamaForCausalLM": (TEXT, _TEXT),
    "GemmaForCausalLM": (TEXT, _TEXT),
    "Gemma2ForCausalLM": (TEXT, _TEXT),
    "Qwen2ForCausalLM": (TEXT, _TEXT),
    "Qwen3ForCausalLM": (TEXT, _TEXT),
    "GPT2LMHeadModel": (TEXT, {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": 96}),
    "GPTNeoXForCausalLM": (TEXT, _PLAIN),
    "OPTForCausalLM": (TEXT, _PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "FalconForCausalLM": (TEXT, _PLAIN | {"ffn_hidden_size": 48}),
    "BloomForCausalLM": (TEXT, {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96}),
    "PhiForCausalLM": (TEXT, _PLAIN),
    "Olmo2ForCausalLM": (TEXT, _TEXT),
    "CohereForCausalLM": (TEXT, _TEXT),
    "GraniteForCausalLM": (TEXT, _TEXT),
    "StableLmForCausalLM": (TEXT, _TEXT),
    "Glm4ForCausalLM": (TEXT, _TEXT),
    "MiniMaxForCausalLM": (TEXT, _TEXT | _EXPERTS | {"layer_types": ["linear_attention"], "block_size": 8}),
    # hybrids and recurrences
    "JambaForCausalLM": (
        TEXT,
        _TEXT
        | {"num_hidden_layers": 2, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "MambaForCausalLM": (TEXT, {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "vocab_size": 96}),
    "Mamba2ForCausalLM": (
        TEXT,
        {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16, "state_size": 8, "vocab_size": 96}
        | {"n_groups": 1, "chunk_size": 8},
    ),
    "FalconMambaForCausalLM": (TEXT, {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "vocab_size": 96}),
    "FalconH1ForCausalLM": (TEXT, _TEXT | _MAMBA2 | {"mamba_d_ssm": 64}),
    "BambaForCausalLM": (TEXT, _TEXT | _MAMBA2),
    "GraniteMoeHybridForCausalLM": (
        TEXT,
        _TEXT | _MAMBA2 | _EXPERTS | {"layer_types": ["mamba"], "shared_intermediate_size": 24},
    ),
    "Lfm2ForCausalLM": (TEXT, _TEXT | {"layer_types": ["conv"], "block_multiple_of": 16}),
    "RecurrentGemmaForCausalLM": (TEXT, _TEXT | {"lru_width": 32, "block_types": ["recurrent"]}),
    "Qwen3NextForCausalLM": (
        TEXT,
        _TEXT
        | _EXPERTS
        | {"layer_types": ["linear_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24},
    ),
    # mixtures
    "MixtralForCausalLM": (TEXT, _TEXT | _EXPERTS),
    "Qwen3MoeForCausalLM": (TEXT, _TEXT | _EXPERTS),
    "OlmoeForCausalLM": (TEXT, _TEXT | _EXPERTS),
    "PhimoeForCausalLM": (TEXT, _TEXT | _EXPERTS),
    "Llama4ForCausalLM": (
        TEXT,
        _TEXT | _EXPERTS | {"intermediate_size_mlp": 48, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    ),
    "GptOssForCausalLM": (TEXT, _TEXT | _EXPERTS),
    # encoders
    "BertForMaskedLM": (TEXT, _PLAIN),
    "RobertaForMaskedLM": (TEXT, _PLAIN),
    "DebertaForMaskedLM": (TEXT, _PLAIN | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "DebertaV2ForMaskedLM": (TEXT, _PLAIN),
    "MobileBertForMaskedLM": (
        TEXT,
        _PLAIN | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "DistilBertForMaskedLM": (TEXT, {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "vocab_size": 96}),
    "ElectraForMaskedLM": (TEXT, _PLAIN | {"embedding_size": 16}),
    "ModernBertForMaskedLM": (TEXT, _PLAIN | {"global_attn_every_n_layers": 1}),
    "AlbertForMaskedLM": (TEXT, _PLAIN | {"embedding_size": 16}),
    # two stacks
    "T5ForConditionalGeneration": (BOTH, _T5),
    "BartForConditionalGeneration": (BOTH, _STACKS | {"max_position_embeddings": 64, "eos_token_id": 2}),
    # images and sound
    "ViTForImageClassification": (IMAGE, _SEES),
    "ViTMAEForPreTraining": (
        IMAGE,
        _SEES
        | {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
        | {"decoder_intermediate_size": 48, "mask_ratio": 0.0},
    ),
    "BitForImageClassification": (
        IMAGE,
        {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "num_groups": 4, "global_padding": "same"},
    ),
    "WhisperForConditionalGeneration": (
        SOUND,
        _STACKS
        | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, "bos_token_id": 1}
        | {"eos_token_id": 2},
    ),
    "Wav2Vec2ForCTC": (WAVE, _WAVES | {"vocab_size": 16}),
    "WavLMForCTC": (WAVE, _WAVES | {"vocab_size": 16}),
    "Wav2Vec2ForXVector": (
        WAVE,
        _WAVES | {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8},
    ),
}
"""Class -> what it is fed with, and its config."""
QUICK = (
    *("LlamaForCausalLM", "FalconForCausalLM", "JambaForCausalLM", "MambaForCausalLM", "FalconH1ForCausalLM"),
    *("Lfm2ForCausalLM", "Llama4ForCausalLM", "MobileBertForMaskedLM", "ViTForImageClassification"),
    *("Wav2Vec2ForXVector", "WavLMForCTC", "WhisperForConditionalGeneration"),
)
"""One of each kind of trouble."""


def family(name: str) -> nn.Module:
    """A seeded toy: equal names give equal bits. No weight is zero, so that nothing hides."""
    kind: Any = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**FAMILIES[name][1]))
        for parameter in model.parameters():
            width = max(1, parameter[0].numel() if parameter.ndim > 1 else 100)
            parameter.data.add_(torch.randn_like(parameter), alpha=0.5 * width**-0.5)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # some hybrids of one kind of layer alone have no cache
    return model.eval()


@torch.no_grad()
def answer(name: str, model: nn.Module) -> Tensor:
    """What a toy says to an input of its kind: its logits, or the first tensor it returns."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 7), generator=draw)
    inputs: Mapping[str, Callable[[], dict[str, Tensor]]] = {
        TEXT: lambda: {"input_ids": ids},
        BOTH: lambda: {"input_ids": ids, "decoder_input_ids": ids},
        IMAGE: lambda: {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)},
        SOUND: lambda: {"input_features": torch.randn(2, 8, 16, generator=draw), "decoder_input_ids": ids},
        WAVE: lambda: {"input_values": torch.randn(2, 400, generator=draw)},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = model(**inputs[FAMILIES[name][0]]())
    return out.logits if getattr(out, "logits", None) is not None else out[0]
