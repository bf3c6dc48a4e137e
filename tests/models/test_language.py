"""What a config says of a model's language half, wherever in it that stands; and that the checks of a run read it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, RobertaConfig, RobertaForCausalLM

import gossamer as gs
from gossamer.data.masks import Example
from gossamer.errors import DataError
from gossamer.models import tiny
from gossamer.models.language import positions, text_config
from gossamer.training.audit import refuse_misfits


def seeing() -> Any:
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": 320, "max_position_embeddings": 40}
    image = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    image |= {"image_size": 16, "patch_size": 8}
    tokens = {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302, "mm_tokens_per_image": 4}
    fields: dict[str, Any] = {"text_config": text, "vision_config": image} | tokens
    return Gemma3ForConditionalGeneration(Gemma3Config(**fields))


def counting() -> Any:
    """Learned positions that begin behind the padding's id."""
    narrow: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = narrow | {"intermediate_size": 48, "vocab_size": 320, "max_position_embeddings": 42, "is_decoder": True}
    return RobertaForCausalLM(RobertaConfig(**fields))


def example(length: int, token: int = 5) -> Example:
    return Example([token] * length, [True] * length, "row 1")


@pytest.mark.parametrize("make", [seeing, counting])
def test_rows_longer_than_the_positions(make: Any):
    model = make()
    assert positions(model) == 40
    refuse_misfits(model, [example(40)])
    with pytest.raises(DataError, match="longer than the model can read") as caught:
        refuse_misfits(model, [example(41)])
    assert "40" in caught.value.expected


def test_tokens_outside_of_a_nested_vocabulary():
    assert text_config(seeing().config).vocab_size == 320
    with pytest.raises(DataError, match="not this model's"):
        refuse_misfits(seeing(), [example(3, token=320)])


def test_virtual_tokens_take_positions():
    model = tiny("gpt2")
    room = positions(model)
    assert room is not None
    gs.attach(model, gs.PromptTuning(num_virtual_tokens=3), name="a")
    refuse_misfits(model, [example(room - 3)])
    with pytest.raises(DataError, match="longer than the model can read") as caught:
        refuse_misfits(model, [example(room - 2)])
    assert "3 virtual tokens" in caught.value.expected
    gs.use(model, None)
    refuse_misfits(model, [example(room)])
    with torch.no_grad():
        assert model(torch.full((1, room), 5)).logits.isfinite().all()
