"""Text from a model as it stands: active adapters, merged weights or the plain base."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gossamer.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Continue prompts, one after another, through transformers' own generation.

    Args:
        prompts: texts, continued as they are, or user messages when `chat`.
        max_tokens: at most this many new tokens; generation also ends at the end-of-sequence token.
        temperature: 0 takes the likeliest token each time; above 0 samples from softmax(logits / temperature).
        seed: of the sampling; torch's own random state is left as it was.
        chat: put each prompt through the tokenizer's chat template.

    Returns:
        One {"prompt", "text", "tokens", "seconds"} a prompt; `text` is the continuation alone.

    Raises: UsageError for an empty prompt or settings out of range.
    """
    if max_tokens < 1 or temperature < 0:
        got = f"max_tokens={max_tokens}, temperature={temperature}"
        raise UsageError("settings out of range", got=got, expected="max_tokens >= 1, temperature >= 0")
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"max_new_tokens": max_tokens, "pad_token_id": pad} | sampling
        return [_continued(model, tokenizer, prompt, chat, settings) for prompt in prompts]


def _continued(model: Any, tokenizer: Any, prompt: str, chat: bool, settings: dict[str, Any]) -> dict[str, Any]:
    text = prompt
    if chat:
        if not tokenizer.chat_template:
            raise UsageError("this tokenizer has no chat template", hint="leave chat off")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise UsageError("an empty prompt has nothing to continue", got=repr(prompt))
    start = time.monotonic()
    tokens = model.generate(**encoded, **settings)[0, length:]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": len(tokens),
        "seconds": time.monotonic() - start,
    }
