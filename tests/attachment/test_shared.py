"""One weight under several names: adapted once, merged once, or refused with nothing changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import SharedWeightError
from gossamer.models import tiny
from tests.adapters import bits, same_bits, tokens, trained


class Twice(nn.Module):
    """One Linear under two names, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


@pytest.mark.parametrize("targets", ["all-linear", ("second",), ("first", "second"), ".*second"])
def test_a_module_under_two_names_is_adapted_once_and_merged_once(targets: str | tuple[str, ...]):
    model, x = Twice(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = bits(model)
    adapter = trained(model, gs.LoRA(r=2, target_modules=targets))
    assert [path for path in adapter.paths if path != "last"] == ["first"]
    delta = adapter.delta("first").double()
    weight, bias = model.first.weight.double() + delta, model.first.bias.double()
    inner = nn.functional.linear(nn.functional.linear(x.double(), weight, bias), weight, bias)
    with torch.no_grad():
        last = model.last.weight.double() + (adapter.delta("last").double() if "last" in adapter.paths else 0)
        expected = nn.functional.linear(inner, last, model.last.bias.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    gs.merge(model)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.first.weight.double(), weight.detach(), rtol=1e-6, atol=1e-6)
    gs.detach(model)
    assert same_bits(bits(model), before)
    assert model.first is model.second


def test_the_report_says_so():
    assert "one module under 2 names" in str(gs.attach(Twice(), gs.LoRA(r=2)))


@pytest.mark.parametrize(
    "spec",
    [
        gs.LoRA(r=2, target_modules=("lm_head", "q_proj")),
        gs.LoRA(r=2, modules_to_save=("embed_tokens",)),
        gs.LoRA(r=2, modules_to_save=("lm_head",)),
    ],
    ids=["head adapted", "embedding saved", "head saved"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings(spec: gs.LoRA, dtype: torch.dtype):
    """Beside the weight all is well; folding into it would change the other module too, so that is refused."""
    model = tiny("llama", tie_word_embeddings=True, dtype=dtype)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before, ids = bits(model), tokens()
    adapter = trained(model, spec)
    beside = model(ids).logits
    with pytest.raises(SharedWeightError) as caught:
        gs.merge(model)
    assert "embed_tokens.weight" in caught.value.got
    assert "lm_head.weight" in caught.value.got
    assert same_bits(bits(model), before)
    assert torch.equal(model(ids).logits, beside), "still beside the weights"
    if "lm_head" in adapter.paths and "lora_A" in adapter.tensors["lm_head"]:
        hidden = forward_to_head(model, ids)
        expected = hidden @ (model.lm_head.weight.float() + adapter.delta("lm_head")).T
        torch.testing.assert_close(beside.float(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)
    gs.detach(model)
    assert same_bits(bits(model), before)


@torch.no_grad()
def forward_to_head(model: nn.Module, ids: Tensor) -> Tensor:
    return model.model(ids).last_hidden_state.float()


def test_a_tied_model_merges_where_no_shared_weight_is_touched():
    model, ids = tiny("llama", tie_word_embeddings=True), tokens()
    trained(model, gs.LoRA(r=2))
    beside = model(ids).logits
    gs.merge(model)
    torch.testing.assert_close(model(ids).logits, beside, rtol=1e-4, atol=1e-4)


def test_views_of_one_storage_are_seen():
    """Two modules whose parameters are different tensors in one storage."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach().view(4, 4))
    before = bits(model)
    trained(model, gs.LoRA(r=2, target_modules=("0",)))
    with pytest.raises(SharedWeightError):
        gs.merge(model)
    assert same_bits(bits(model), before)
