"""Seeded toy models and a byte-level tokenizer: every architecture's real classes, small enough for a test.

Weights are drawn wider than usual, and biases and norms are moved off their constant starts, so that a test notices a
bias that was lost, a scale that was skipped or two layers that were swapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gossamer.errors import UsageError, nearest

VOCABULARY = 320
PAD, BOS, EOS, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"

_SPECIAL_IDS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
_NARROW = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_DECODER = _NARROW | {"intermediate_size": 96, "max_position_embeddings": 512, "initializer_range": 0.1}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_ENCODER = _DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_THREE = {"num_labels": 3}

# name -> (model class, config fields). Dropout is off, so that a training step is repeatable.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "llama_classifier": ("LlamaForSequenceClassification", _GROUPED | _THREE),
    "mistral": ("MistralForCausalLM", _GROUPED | {"head_dim": 16, "sliding_window": None}),
    "gemma": ("GemmaForCausalLM", _GROUPED | {"head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": VOCABULARY}
        | {"initializer_range": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "opt": (
        "OPTForCausalLM",
        _NARROW
        | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 512, "init_std": 0.1, "dropout": 0.0},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _DECODER),
    "bert": ("BertForSequenceClassification", _ENCODER | _THREE),
    "bert_mlm": ("BertForMaskedLM", _ENCODER),
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
        architecture: "llama", "mistral", "gemma", "qwen2", "gpt2", "opt", "gpt_neox", "bert" (a classifier of three
            labels), "bert_mlm" or "llama_classifier".
        seed: equal seeds give bit-equal weights; torch's global generator is left as it was.
        dtype: of the parameters.
        config: fields of the architecture's own config that differ, such as `tie_word_embeddings=True`.

    Raises `UsageError` for an unknown architecture.
    """
    if architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        hint = nearest(architecture, _ARCHITECTURES)
        raise UsageError("no toy of this architecture", got=architecture, expected=known, hint=hint)
    import transformers

    class_name, fields = _ARCHITECTURES[architecture]
    kind: Callable[..., PreTrainedModel] = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = kind(kind.config_class(**(fields | _SPECIAL_IDS | config)))
        _perturb_vectors(model)
    return model.to(dtype).eval()  # pyright: ignore[reportArgumentType]


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


@torch.no_grad()
def _perturb_vectors(model: PreTrainedModel) -> None:
    """Biases start at 0 and norms at 1; a toy with such constants would hide their loss."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
