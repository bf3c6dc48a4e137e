"""Houlsby's and Lin's adapters against their own equations in float64, where they stand, and that they do not merge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import SpecError, UnsupportedError
from gossamer.methods import Houlsby, Lin
from gossamer.models import tiny, tiny_inputs
from tests.adapters import bits, same_bits, shaken

ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + (-x).exp()),
}


def plain(h: Tensor, slots: dict[str, Tensor], activation: str) -> Tensor:
    """`h + up(act(down(norm(h))))`, written out."""
    inner = h
    if "m.norm.weight" in slots:
        centred = h - h.mean(-1, keepdim=True)
        inner = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        inner = inner * slots["m.norm.weight"] + slots["m.norm.bias"]
    down = torch.einsum("bw,...w->...b", slots["m.down.weight"], inner) + slots["m.down.bias"]
    return h + torch.einsum("wb,...b->...w", slots["m.up.weight"], ACTIVATIONS[activation](down)) + slots["m.up.bias"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", [Houlsby, Lin])
def test_the_equation_and_its_gradients(method: type[Houlsby | Lin], activation: str):
    module, generator = nn.Linear(7, 6).double(), torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"m": module}).eval()
    gs.attach(model, method(target_modules=("m",), bottleneck=5, activation=activation))  # pyright: ignore[reportArgumentType]
    shaken(model, "default", 0.5)
    x = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator)
    own = gs.trainable_parameters(model, "default")
    leaves = {name: value.detach().double().requires_grad_() for name, value in own.items()}
    h = (x @ module.weight.T + module.bias).detach()
    expected = plain(h, leaves, activation)
    torch.testing.assert_close(model["m"](x), expected, rtol=1e-10, atol=1e-10)
    model["m"](x).square().sum().backward()
    expected.square().sum().backward()
    for name, value in own.items():
        torch.testing.assert_close(value.grad.double(), leaves[name].grad, rtol=1e-4, atol=1e-5)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("method", [Houlsby, Lin])
@torch.no_grad()
def test_real_architectures(architecture: str, method: type[Houlsby | Lin]):
    model, inputs = tiny(architecture), tiny_inputs(architecture)
    before = model(**inputs).logits
    report = gs.attach(model, method(bottleneck=6))
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)
    attentions = {"t5": 2 + 4}.get(architecture, 2) if method is Houlsby else 0
    modules = attentions + {"t5": 2 + 2}.get(architecture, 2)
    assert len(report.sites) == modules
    width = 64
    assert report.trainable == modules * (2 * width * 6 + width + 6 + (2 * width if method is Lin else 0))
    shaken(model, "default")
    out = model(**inputs).logits
    assert not torch.allclose(out, before, atol=1e-3)
    with gs.using(model, ["default", None]):
        rows = model(**inputs).logits
    torch.testing.assert_close(rows, torch.stack([out[0], before[1]]), rtol=1e-5, atol=1e-5)
    kept = bits(model)
    with pytest.raises(UnsupportedError, match="nonlinearity"):
        gs.merge(model)
    assert same_bits(bits(model), kept)
    assert torch.equal(model(**inputs).logits, out)


def test_where_they_stand():
    model = tiny("bert")
    ends = {
        row.path.split(".layer.0.")[-1] for row in gs.attach(model, Houlsby(), "h").sites if ".layer.0." in row.path
    }
    assert ends == {"attention.output.dense", "output.dense"}
    ends = {row.path.split(".layer.0.")[-1] for row in gs.attach(model, Lin(), "l").sites if ".layer.0." in row.path}
    assert ends == {"output.dense"}


def test_how_they_start():
    model = nn.ModuleDict({"m": nn.Linear(400, 400)})
    gs.attach(model, Houlsby(target_modules=("m",)))
    slots = gs.capture(model).tensors["m"]
    assert not any(slots[name].any() for name in ("down.bias", "up.weight", "up.bias"))
    assert slots["down.weight"].abs().max() <= 0.02
    assert slots["down.weight"].std() == pytest.approx(0.0088, rel=0.02)  # a normal cut at two deviations of 0.01
    gs.detach(model)
    gs.attach(model, Lin(target_modules=("m",)))
    slots = gs.capture(model).tensors["m"]
    assert not any(slots[name].any() for name in ("down.bias", "up.weight", "up.bias", "norm.bias"))
    assert (slots["norm.weight"] == 1).all()
    assert slots["down.weight"].abs().max() <= 0.05
    assert slots["down.weight"].std() == pytest.approx(0.05 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("method", [Houlsby, Lin])
def test_they_run_in_the_models_dtype_and_drop_in_training_only(method: type[Houlsby | Lin]):
    model = nn.ModuleDict({"m": nn.Linear(8, 8)}).to(torch.bfloat16)
    gs.attach(model, method(target_modules=("m",), dropout=0.5))
    shaken(model, "default")
    x = torch.randn(3, 8).bfloat16()
    assert model["m"](x).dtype == torch.bfloat16
    assert not torch.equal(model["m"](x), model["m"](x))
    model.eval()
    assert torch.equal(model["m"](x), model["m"](x))


def test_faults_of_a_spec():
    with pytest.raises(SpecError, match="bottleneck"):
        Houlsby(bottleneck=0)
    with pytest.raises(SpecError, match="activation"):
        Lin(activation="tanh")  # pyright: ignore[reportArgumentType]
