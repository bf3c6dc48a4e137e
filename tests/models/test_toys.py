"""The toys: every architecture runs, seeds decide, and the tokenizer loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import UsageError
from gossamer.models import tiny, tiny_tokenizer

ARCHITECTURES = (
    "llama",
    "mistral",
    "gemma",
    "qwen2",
    "gpt2",
    "opt",
    "gpt_neox",
    "bert",
    "bert_mlm",
    "llama_classifier",
)
TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_runs_and_is_decided_by_its_seed(architecture: str) -> None:
    state = torch.get_rng_state()
    model, twin, other = tiny(architecture), tiny(architecture), tiny(architecture, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    ids = torch.tensor([TOKENIZER("Hello, world").input_ids])
    logits = model(ids).logits
    assert logits.shape[-1] == (3 if architecture in ("bert", "llama_classifier") else 320)
    assert torch.equal(logits, twin(ids).logits)
    assert not torch.equal(logits, other(ids).logits)
    assert logits.std() > 0.1, "a toy must say something"
    assert not model.training
    assert model.dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_bias_or_norm_is_constant(architecture: str) -> None:
    for name, parameter in tiny(architecture).named_parameters():
        assert parameter.std() > 0, name


def test_config_fields_and_dtype() -> None:
    model = tiny("llama", dtype=torch.bfloat16, tie_word_embeddings=True, num_hidden_layers=3)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 3
    assert model.get_parameter("model.embed_tokens.weight") is model.get_parameter("lm_head.weight")
    special = (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    assert special == (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)


def test_unknown_architecture() -> None:
    with pytest.raises(UsageError) as caught:
        tiny("lama")
    assert "'llama'" in caught.value.hint


@given(st.text())
def test_the_tokenizer_loses_nothing(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_special_tokens() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (256, 257, 258)
    assert len(TOKENIZER) <= 320
    text = "<|im_start|>user\nhi<|im_end|>\n"
    ids = TOKENIZER(text).input_ids
    assert len(ids) == len("user\nhi\n") + 2
    assert TOKENIZER.decode(ids) == text
    messages = [{"role": "user", "content": "hi"}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == text
    opened = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == text + "<|im_start|>assistant\n"
