"""The toys: every architecture runs, seeds decide, and the tokenizer loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.errors import UsageError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.testing.toys import tiny_inputs

DECODERS = ("llama", "mistral", "mixtral", "gemma", "gemma3", "qwen2", "qwen3_moe", "phi", "gpt2", "gpt_neox", "opt")
DECODERS += ("falcon", "bloom")
WRITERS = ("t5", "bart", "whisper")
CLASSIFIERS = ("llama_classifier", "bert", "roberta", "deberta_v2", "vit")
ARCHITECTURES = (*DECODERS, *WRITERS, *CLASSIFIERS, "bert_mlm", "clip")
SHAPES = {"clip": (2, 2)} | dict.fromkeys(CLASSIFIERS, (2, 3))
"""Of the main output on two rows; of all others (2, 9, 320)."""
TOKENIZER = tiny_tokenizer()


def said(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The main output and the loss."""
    out = model(**inputs)
    return (out.logits_per_image if "logits_per_image" in out else out.logits), out.loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_runs_and_is_decided_by_its_seed(architecture: str) -> None:
    state = torch.get_rng_state()
    model, twin, other = tiny(architecture), tiny(architecture), tiny(architecture, seed=1)
    inputs, others = tiny_inputs(architecture), tiny_inputs(architecture, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    logits, loss = said(model, inputs)
    assert logits.shape == SHAPES.get(architecture, (2, 9, 320))
    assert 0 < loss.item() < 10
    assert torch.equal(logits, said(twin, tiny_inputs(architecture))[0])
    assert not torch.equal(logits, said(other, inputs)[0])
    assert not torch.equal(logits, said(model, others)[0])
    assert logits.std() > 0.1, "a toy must say something"
    assert not model.training
    assert model.dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_toy_is_small_repeatable_and_moved_off_its_constants(architecture: str) -> None:
    model = tiny(architecture)
    assert model.num_parameters() < 250_000
    for name, parameter in model.named_parameters():
        assert parameter.ndim == 0 or parameter.std() > 0, name
    inputs = tiny_inputs(architecture)
    still = said(model, inputs)[0]
    assert torch.equal(said(model.train(), inputs)[0], still), "no dropout"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 3])
def test_inputs(architecture: str, rows: int) -> None:
    inputs = tiny_inputs(architecture, rows=rows)
    for name, value in inputs.items():
        assert name == "return_loss" or value.shape[0] == rows
        if name == "input_ids" or value.ndim == 2:
            assert value.shape == (rows, 9)
            assert value.min() >= 0
            assert value.max() == 249, "and every row ends with it"
    logits, loss = said(tiny(architecture), inputs)
    assert logits.shape[0] == rows
    assert loss.isfinite()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_four_experts_of_which_two_are_asked(architecture: str) -> None:
    model = tiny(architecture)
    for layer in model.model.layers:
        assert layer.mlp.experts.gate_up_proj.shape[0] == 4
        assert layer.mlp.gate.top_k == 2


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
    with pytest.raises(UsageError) as caught:
        tiny_inputs("vitt")
    assert "'vit'" in caught.value.hint


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
