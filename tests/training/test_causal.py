"""Whether a model sees what it is to predict: found by trying, for every toy decoder, and for readers both ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import gossamer as gs
from gossamer.errors import UnsupportedError
from gossamer.models import tiny
from gossamer.training.audit import refuse_if_it_sees_ahead
from tests.adapters import shaken, tokens

DECODERS = ("llama", "gpt2")
NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
MORE: dict[str, dict[str, Any]] = {
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "state_size": 4},
    "Mixtral": NARROW | {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4},
    "Gemma2": NARROW | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 2},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 60},
    "Bert": NARROW | {"intermediate_size": 48, "is_decoder": True},
}
WIDER: dict[str, Any] = NARROW | {"intermediate_size": 48, "initializer_range": 0.1}
BOTH_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertLMHeadModel", NARROW | {"intermediate_size": 48, "initializer_range": 0.2}),
    "roberta": ("RobertaForCausalLM", NARROW | {"intermediate_size": 48, "initializer_range": 0.2}),
    "xlnet": (
        "XLNetLMHeadModel",
        {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "vocab_size": 60, "initializer_range": 0.2},
    ),
}


def made(name: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**fields)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*DECODERS, *MORE])
def test_a_decoder_passes_and_is_as_it_was(name: str, dtype: torch.dtype):
    if name in DECODERS:
        model: Any = tiny(name, dtype=dtype)
    else:
        model = made(f"{name}LMHeadModel" if name == "Bert" else f"{name}ForCausalLM", MORE[name], dtype)
    model.train()
    before = torch.get_rng_state()
    refuse_if_it_sees_ahead(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_reader_both_ways_is_refused(name: str, dtype: torch.dtype):
    with pytest.raises(UnsupportedError, match="sees the tokens") as caught:
        refuse_if_it_sees_ahead(made(*BOTH_WAYS[name], dtype))
    assert "moves the logits" in caught.value.got


class Prefixed(transformers.LlamaForCausalLM):
    """The first three tokens see one another, all others what is before them: a prefix language model."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        length = input_ids.shape[1]
        seen = torch.ones(length, length).tril().bool()
        seen[:3, :3] = True
        mask = torch.zeros(length, length).masked_fill(~seen, -1e9)
        return super().forward(input_ids, attention_mask=mask.expand(len(input_ids), 1, length, length), **others)


def test_a_prefix_that_is_read_both_ways_is_refused():
    config = transformers.LlamaConfig(**WIDER)
    with pytest.raises(UnsupportedError, match="sees the tokens"):
        refuse_if_it_sees_ahead(Prefixed(config))


class Turning(torch.nn.Module):
    """A causal model whose first run is disturbed, as by a router that turns on a rounding error."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.runs = torch.nn.Embedding(40, 40), 0

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        self.runs += 1
        logits = self.table(input_ids).cumsum(1)
        return SimpleNamespace(logits=logits + (self.runs == 1) * torch.randn(logits.shape))


def test_one_leak_is_not_believed():
    refuse_if_it_sees_ahead(model := Turning())
    assert model.runs == 2
    refuse_if_it_sees_ahead(model)
    assert model.runs == 2, "tried once a model"


def test_adapters_are_off_meanwhile_and_on_again():
    model = tiny("llama")
    gs.attach(model, gs.PrefixTuning(num_virtual_tokens=2), name="a")
    shaken(model, "a")
    with torch.no_grad():
        before = model(tokens()).logits
        refuse_if_it_sees_ahead(model)
        assert gs.active(model) == ("a",)
        assert torch.equal(model(tokens()).logits, before)
