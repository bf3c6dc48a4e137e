"""Seeded toy models and a byte-level tokenizer: every architecture's real classes, small enough for a test.

Weights are drawn wider than usual, and biases and norms are moved off their constant starts, so that a test notices a
bias that was lost, a scale that was skipped or two layers that were swapped.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gossamer.errors import UsageError, nearest
from gossamer.testing.toy_inputs import (
    CHANNELS,
    FRAMES,
    IMAGE,
    LABELS,
    MELS,
    Draw,
    classified_image,
    classified_text,
    image_and_text,
    speech_to_text,
    text,
    text_to_text,
)

VOCABULARY = 320
PAD, BOS, EOS, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"

_SPECIAL_IDS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
_NARROW = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_DECODER = _NARROW | {"intermediate_size": 96, "max_position_embeddings": 512, "initializer_range": 0.1}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_ENCODER = _DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LABELLED = {"num_labels": LABELS}
_TWO_STACKS = {"d_model": 64, "vocab_size": VOCABULARY, "dropout": 0.0, "init_std": 0.1} | {
    f"{stack}_{field}": value
    for stack in ("encoder", "decoder")
    for field, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
}
_SEEING = {"image_size": IMAGE, "patch_size": 4, "num_channels": CHANNELS}

# name -> (model class, config fields, inputs). Dropout is off, so that a training step is repeatable.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any], Draw]] = {
    "llama": ("LlamaForCausalLM", _GROUPED, text),
    "llama_classifier": ("LlamaForSequenceClassification", _GROUPED | _LABELLED, classified_text),
    "mistral": ("MistralForCausalLM", _GROUPED | {"head_dim": 16, "sliding_window": None}, text),
    "mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, text),
    "gemma": ("GemmaForCausalLM", _GROUPED | {"head_dim": 16}, text),
    "gemma3": (
        "Gemma3ForCausalLM",
        _GROUPED
        | {"head_dim": 16, "query_pre_attn_scalar": 16}
        | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        text,
    ),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED, text),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        _GROUPED | {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
        text,
    ),
    "phi": ("PhiForCausalLM", _DECODER, text),
    "falcon": ("FalconForCausalLM", _NARROW | {"ffn_hidden_size": 96, "initializer_range": 0.1}, text),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "initializer_range": 0.1},
        text,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": VOCABULARY}
        | {"initializer_range": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        text,
    ),
    "opt": (
        "OPTForCausalLM",
        _NARROW
        | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 512, "init_std": 0.1, "dropout": 0.0},
        text,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _DECODER, text),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
        | {"vocab_size": VOCABULARY, "dropout_rate": 0.0, "decoder_start_token_id": 256},
        text_to_text,
    ),
    "bart": (
        "BartForConditionalGeneration",
        _TWO_STACKS | {"max_position_embeddings": 512, "decoder_start_token_id": 258, "forced_eos_token_id": 258},
        text_to_text,
    ),
    "bert": ("BertForSequenceClassification", _ENCODER | _LABELLED, classified_text),
    "bert_mlm": ("BertForMaskedLM", _ENCODER, text),
    "roberta": ("RobertaForSequenceClassification", _ENCODER | _LABELLED, classified_text),
    "deberta_v2": (  # with version 3's relative positions
        "DebertaV2ForSequenceClassification",
        _ENCODER
        | _LABELLED
        | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
        | {"norm_rel_ebd": "layer_norm", "position_biased_input": False},
        classified_text,
    ),
    "vit": ("ViTForImageClassification", _ENCODER | _SEEING | _LABELLED, classified_image),
    "clip": (
        "CLIPModel",
        {
            "projection_dim": 32,
            "text_config": _DECODER | _SPECIAL_IDS | {"eos_token_id": 2},  # OpenAI's: read a text at its largest id
            "vision_config": _DECODER | _SEEING,
        },
        image_and_text,
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        _TWO_STACKS
        | {"num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 64}
        | {"decoder_start_token_id": 257, "begin_suppress_tokens": None},
        speech_to_text,
    ),
}

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A randomly initialised model of two layers, width 64 and a vocabulary of 320, in eval mode on the CPU.

    Args:
        architecture: decoders "llama", "mistral", "mixtral", "gemma", "gemma3", "qwen2", "qwen3_moe", "phi", "gpt2",
            "gpt_neox", "opt", "falcon", "bloom" (experts: four, two a token); encoder-decoders "t5", "bart", "whisper";
            classifiers of three labels "llama_classifier", "bert", "roberta", "deberta_v2", "vit"; "bert_mlm"; "clip".
        seed: equal seeds give bit-equal weights; torch's global generator is left as it was.
        dtype: of the parameters.
        config: fields of the architecture's own config that differ, such as `tie_word_embeddings=True`.

    Raises `UsageError` for an unknown architecture.
    """
    class_name, fields, _ = _known(architecture)
    import transformers

    kind: Any = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: Any = kind(kind.config_class(**(fields | _SPECIAL_IDS | config)))
        _perturb_vectors(model)
    return model.to(dtype).eval()


def tiny_inputs(architecture: str, *, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for one forward pass of a toy that also gives its loss.

    Args:
        architecture: as in `tiny`.
        rows: how many examples; CLIP tells rows apart, so that one row alone has a loss of zero.
        seed: equal seeds give equal inputs; torch's global generator is left as it was.

    Returns:
        Of "input_ids" (rows, 9; int64 in 0..249), "pixel_values" (rows, 3, 16, 16; float32), "input_features"
        (rows, 16, 32; float32), "labels" (token ids or classes; int64) and "return_loss" (true; CLIP's only) those
        that the toy's forward takes.

    Raises `UsageError` for an unknown architecture.
    """
    return _known(architecture)[2](rows, torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255) and four special tokens; `decode(encode(text)) == text` for every text.

    Nothing is added around a text: pad `<|endoftext|>` (256), bos `<|im_start|>` (257), eos `<|im_end|>` (258) and mask
    `<|mask|>` (259) are distinct, and the chat template is ChatML without a default system prompt.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS, MASK])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        mask_token=MASK,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _known(architecture: str) -> tuple[str, dict[str, Any], Draw]:
    if architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        hint = nearest(architecture, _ARCHITECTURES)
        raise UsageError("no toy of this architecture", got=architecture, expected=known, hint=hint)
    return _ARCHITECTURES[architecture]


@torch.no_grad()
def _perturb_vectors(model: PreTrainedModel) -> None:
    """Biases start at 0 and norms at 1; a toy with such constants would hide their loss."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
