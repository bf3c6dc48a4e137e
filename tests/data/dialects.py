"""Toy tokenizers that speak as the large ones do: their chat templates, their ways with spaces and accents."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gossamer.data.rows import Chat, Turn
from gossamer.models import tiny_tokenizer

CHATML_WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
FORGETS_THOUGHTS = (  # as reasoning models do: what comes before </think> is dropped from all but the last turn
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if loop.last else "
    "m['content'].split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_TURN_ONLY = "{{ messages[-1]['content'] + '<|im_end|>' }}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
SHOUTS = CHATML_WITH_DEFAULT_SYSTEM.replace("m['content']", "m['content'] | upper")
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def byte_level(template: str | None, **special: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer with another template, and pad equal to EOS as SmolLM2 from GGUF has it."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({**special, "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def llama_2(*, template: str | None = LLAMA_2) -> PreTrainedTokenizerFast:
    """SentencePiece's manners: a dummy space before any text, byte fallback, a BOS in front."""
    alphabet = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁:abcdefghijklmnopqrstuvwxyz",
        "▁g",
    ]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "g")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def composing() -> PreTrainedTokenizerFast:
    """A tokenizer that composes accents, as Qwen's does."""
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOY = tiny_tokenizer()
DIALECTS = {
    "chatml": (byte_level(CHATML_WITH_DEFAULT_SYSTEM), "<|im_end|>"),
    "llama 3": (byte_level(LLAMA_3, eos_token="<|eot_id|>"), "<|eot_id|>"),
    "llama 2": (byte_level(LLAMA_2), "<|im_end|>"),
    "llama 2 with sentencepiece": (llama_2(), "</s>"),
}


def chat(*texts: str, where: str = "chat.jsonl:1") -> Chat:
    """A chat of user and assistant in turn."""
    turns = (Turn(("user", "assistant")[i % 2], text, bool(i % 2)) for i, text in enumerate(texts))
    return Chat(where, turns=tuple(turns))
