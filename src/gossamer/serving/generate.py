"""Text from a model as it stands: active adapters, merged weights or the plain base."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.errors import UsageError
from gossamer.serving.vocabulary import Vocabulary, encoded, ends_of, texts, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Iterable[str],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Continue prompts, one after another, through transformers' own generation.

    Args:
        prompts: texts, or one, continued as they are, or user messages when `chat`. What the tokenizer puts around
            texts is added, but no second beginning of a sequence to a text that has one.
        max_tokens: at most this many new tokens; generation also ends at the end-of-sequence token.
        temperature: 0 takes the likeliest token each time; above 0 samples from softmax(logits / temperature).
        seed: of the sampling; torch's own random state is left as it was.
        chat: put each prompt through the tokenizer's chat template.

    Returns:
        One {"prompt", "text", "tokens", "seconds"} a prompt; `text` is the continuation alone. Only tokens that the
        tokenizer has are drawn, whatever rows the model's head has beside them.

    Raises: UsageError for an empty prompt, for one that is no text, or settings out of range.
    """
    if max_tokens < 1 or temperature < 0:
        got = f"max_tokens={max_tokens}, temperature={temperature}"
        raise UsageError("settings out of range", got=got, expected="max_tokens >= 1, temperature >= 0")
    listed = texts(prompts, "prompts")
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = [_Tokens(vocabulary_of(model, tokenizer))]
        ends = {"eos_token_id": sorted(ends_of(model, tokenizer)) or None}
        settings = {"max_new_tokens": max_tokens, "pad_token_id": pad, "logits_processor": drawn} | ends | sampling
        return [_continued(model, tokenizer, prompt, chat, settings) for prompt in listed]


class _Tokens:
    """One of transformers' changes to logits: rows that are no tokens are not drawn."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, _: Tensor, logits: Tensor) -> Tensor:
        logits[..., self.vocabulary.width :] = -torch.inf
        return logits.index_fill_(-1, self.vocabulary.holes.to(logits.device), -torch.inf)


def _continued(model: Any, tokenizer: Any, prompt: str, chat: bool, settings: dict[str, Any]) -> dict[str, Any]:
    text = prompt
    if chat:
        if not tokenizer.chat_template:
            raise UsageError("this tokenizer has no chat template", hint="leave chat off")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([encoded(tokenizer, text, special=not chat)], dtype=torch.long, device=model.device)
    length = ids.shape[1]
    if length == 0:
        raise UsageError("an empty prompt has nothing to continue", got=repr(prompt))
    start = time.monotonic()
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, length:]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": len(tokens),
        "seconds": time.monotonic() - start,
    }
