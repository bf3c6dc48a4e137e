"""Parameters trained whole: which ones, that the model keeps its own, and that one stored twice is trained once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import SharedWeightError, TargetError
from gossamer.methods import BitFit, FullTuning, NormTuning, TargetedMethod
from gossamer.models import tiny, tiny_inputs
from tests.adapters import bits, same_bits, shaken


def own_parameters(model: nn.Module, chosen: Callable[[str, nn.Module], bool]) -> set[str]:
    """Names of the model's parameters, one stored twice counted once, whose module and name are chosen."""
    names = dict(model.named_parameters())
    return {name for name in names if chosen(name, model.get_submodule(name.rpartition(".")[0]))}


WHICH: list[tuple[type[TargetedMethod], Callable[[str, nn.Module], bool]]] = [
    (BitFit, lambda name, module: name.endswith("bias")),
    (NormTuning, lambda name, module: "Norm" in type(module).__name__),
    (FullTuning, lambda name, module: True),
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "bert_mlm", "t5", "clip", "vit", "mixtral"])
@pytest.mark.parametrize(("method", "chosen"), WHICH)
def test_exactly_the_parameters_meant(architecture: str, method: type[TargetedMethod], chosen: Callable):
    model = tiny(architecture)
    expected = own_parameters(model, chosen)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if not expected:
        with pytest.raises(TargetError):
            gs.attach(model, method())
        return
    report = gs.attach(model, method())
    assert {name.removeprefix(".") for name in gs.trainable_parameters(model, "default")} == expected
    assert report.trainable == sum(sizes[name] for name in expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert_mlm", "t5"])
@pytest.mark.parametrize("method", [BitFit, NormTuning, FullTuning])
def test_a_trained_copy_is_what_the_model_would_be(architecture: str, method: type[TargetedMethod]):
    """Forward, gradients and merge against a twin whose own parameters are given the trained values."""
    model, twin, inputs = tiny(architecture), tiny(architecture), tiny_inputs(architecture)
    if method is BitFit and architecture in ("llama", "t5"):
        return
    before = bits(model)
    gs.attach(model, method())
    shaken(model, "default")
    own = gs.trainable_parameters(model, "default")
    for name, value in own.items():
        twin.get_parameter(name).data.copy_(value)
    out, expected = model(**inputs).logits, twin(**inputs).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    expected.square().mean().backward()
    for name, value in own.items():
        torch.testing.assert_close(value.grad, twin.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
    assert same_bits(bits(model), before)
    gs.merge(model)
    merged = dict(model.named_parameters())
    assert all(torch.equal(merged[name], value) for name, value in own.items())
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    gs.detach(model)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("method", [BitFit, NormTuning, FullTuning])
@torch.no_grad()
def test_at_the_start_and_row_by_row(method: type[TargetedMethod]):
    model, inputs = tiny("qwen2"), tiny_inputs("qwen2")
    before = model(**inputs).logits
    gs.attach(model, method())
    assert torch.equal(model(**inputs).logits, before)
    shaken(model, "default")
    out = model(**inputs).logits
    assert not torch.allclose(out, before, atol=1e-3)
    with gs.using(model, ["default", None]):
        rows = model(**inputs).logits
    torch.testing.assert_close(rows, torch.stack([out[0], before[1]]), rtol=1e-5, atol=1e-5)


def test_copies_are_wide_and_run_in_the_models_dtype():
    model, inputs = tiny("llama").to(torch.bfloat16), tiny_inputs("llama")
    gs.attach(model, FullTuning())
    assert {value.dtype for value in gs.trainable_parameters(model, "default").values()} == {torch.float32}
    assert model(**inputs).logits.dtype == torch.bfloat16


class Tied(nn.Module):
    """A head that stores its weight in the embedding, with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))


def test_a_tied_weight_is_trained_once_with_the_gradients_of_both_uses():
    model, twin, ids = Tied(), Tied(), torch.tensor([[0, 1, 2]])
    twin.load_state_dict(model.state_dict())
    report = gs.attach(model, FullTuning())
    assert report.trainable == sum(parameter.numel() for parameter in twin.parameters())
    model(ids).square().sum().backward()
    twin(ids).square().sum().backward()
    own = gs.trainable_parameters(model, "default")
    torch.testing.assert_close(own["embed.weight"].grad, twin.embed.weight.grad)
    assert "head.weight" not in own
    shaken(model, "default")
    out, again = model(ids), Tied()
    again.load_state_dict(twin.state_dict())
    gs.attach(again, gs.capture(model))
    assert torch.equal(again(ids), out)
    gs.merge(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(ids), out)


def test_biases_of_modules_that_share_a_weight():
    model, ids = Tied(), torch.tensor([[0, 1, 2]])
    model.first, model.second = nn.Linear(4, 4), nn.Linear(4, 4)
    model.second.weight = model.first.weight  # both are targets, but only their biases are trained
    before = model(ids)
    gs.attach(model, BitFit())
    assert set(gs.trainable_parameters(model, "default")) == {"norm.bias", "head.bias", "first.bias", "second.bias"}
    assert torch.equal(model(ids), before)
    assert model.second(torch.ones(4)).shape == (4,)


def test_half_of_a_tied_pair_cannot_be_merged():
    model = Tied()
    gs.attach(model, FullTuning(exclude_modules=("embed",)))
    shaken(model, "default")
    with pytest.raises(SharedWeightError):
        gs.merge(model)


@pytest.mark.parametrize("method", [BitFit, NormTuning, FullTuning])
def test_torchs_own_transformer(method: type[TargetedMethod]):
    """Its attention uses the weight and the bias of a part that it does not call."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 3, 8)
    expected = own_parameters(model, dict(WHICH)[method])
    before = model(x)
    gs.attach(model, method())
    assert set(gs.trainable_parameters(model, "default")) == expected
    torch.testing.assert_close(model(x), before)
    shaken(model, "default")
    out = model(x)
    out.square().sum().backward()
    assert all(value.grad is not None for value in gs.trainable_parameters(model, "default").values())
    gs.merge(model)
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)


def test_a_matrix_in_what_is_called_a_norm_is_none():
    class NormedHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    model = nn.ModuleDict({"head": NormedHead(), "norm": nn.BatchNorm1d(4)})
    gs.attach(model, NormTuning())
    assert set(gs.trainable_parameters(model, "default")) == {"norm.weight", "norm.bias"}
