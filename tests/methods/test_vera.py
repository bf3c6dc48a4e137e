"""VeRA against its own equation in float64 and against PEFT's projections; what is shared is held and saved once."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gossamer as gs
from gossamer.errors import AdapterFileError
from gossamer.methods import VeRA
from gossamer.methods.vera import VeRALayer
from gossamer.models import tiny, tiny_inputs
from tests.adapters import shaken


class Net(nn.Module):
    """Two modules of different sizes, one of them stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), Conv1D(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def x() -> Tensor:
    return torch.randn(3, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plain(model: Net, x: Tensor, slots: dict[str, Tensor], A: Tensor, B: Tensor) -> Tensor:
    """The network by the book: `W x + b_vec * (B (d_vec * (A x)))`, slices written out."""
    for name, weight in (("first", model.first.weight), ("second", model.second.weight.T)):
        b, d = slots[f"{name}.vera_lambda_b"], slots[f"{name}.vera_lambda_d"]
        size, inner = weight.shape
        change = torch.einsum("o,or,r,ri->oi", b, B[:size], d, A[:, :inner])
        x = torch.einsum("oi,...i->...o", weight.detach() + change, x) + model.get_submodule(name).bias
        x = torch.tanh(x) if name == "first" else x
    return x


def test_the_equation_and_its_gradients():
    model = net()
    gs.attach(model, VeRA(r=4))
    shaken(model, "default", 0.5)
    shared = gs.capture(model).tensors[""]
    assert {name: tuple(value.shape) for name, value in shared.items()} == {"vera_A": (4, 7), "vera_B": (9, 4)}
    own = gs.trainable_parameters(model, "default")
    leaves = {name: value.detach().double().requires_grad_() for name, value in own.items()}
    expected = plain(model, x(), leaves, shared["vera_A"].double(), shared["vera_B"].double())
    torch.testing.assert_close(model(x()), expected, rtol=1e-10, atol=1e-10)
    model(x()).square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad.double(), leaves[name].grad, rtol=1e-5, atol=1e-6)  # pyright: ignore[reportOptionalMemberAccess]
    out = model(x())
    gs.merge(model)
    torch.testing.assert_close(model(x()), out, rtol=1e-6, atol=1e-6)


def test_it_is_pefts_network_though_the_file_holds_no_projections():
    ours, theirs = net(torch.float32), net(torch.float32)
    spec = VeRA(r=3, projection_seed=11, target_modules=("first", "second"))
    gs.attach(ours, spec)
    shaken(ours, "default")
    config = peft.VeraConfig(r=3, projection_prng_key=11, target_modules=["first", "second"], save_projection=False)
    theirs = peft.get_peft_model(theirs, config)  # pyright: ignore[reportArgumentType]
    for name, value in gs.trainable_parameters(ours, "default").items():
        theirs.get_parameter(f"base_model.model.{name}.default").data.copy_(value)
    torch.testing.assert_close(ours(x().float()), theirs(x().float()), rtol=1e-6, atol=1e-6)
    adapter = gs.capture(ours)
    for name in ("vera_A", "vera_B"):
        assert torch.equal(adapter.tensors[""][name], getattr(theirs.base_model, name)["default"])
    without = gs.Adapter(spec, {path: slots for path, slots in adapter.tensors.items() if path})
    again = net(torch.float32)
    gs.attach(again, without)
    assert torch.equal(again(x().float()), ours(x().float()))


def test_stored_projections_are_used_even_if_larger_than_needed():
    model, other = net(), net()
    spec = VeRA(r=3, projection_seed=1)
    gs.attach(model, spec)
    shaken(model, "default")
    adapter = gs.capture(model)
    grown = {"vera_A": torch.zeros(3, 20), "vera_B": torch.zeros(12, 3)}
    grown["vera_A"][:, :7], grown["vera_B"][:9] = adapter.tensors[""]["vera_A"], adapter.tensors[""]["vera_B"]
    gs.attach(other, gs.Adapter(spec.replace(projection_seed=2), {**adapter.tensors, "": grown}))
    assert torch.equal(other(x()), model(x()))


@pytest.mark.parametrize(
    "shared",
    [
        {"vera_A": torch.zeros(3, 6), "vera_B": torch.zeros(9, 3)},
        {"vera_A": torch.zeros(3, 7), "vera_B": torch.zeros(8, 3)},
        {"vera_A": torch.zeros(2, 7), "vera_B": torch.zeros(9, 2)},
        {"vera_A": torch.zeros(3, 7)},
        {"vera_A": torch.zeros(3, 7), "vera_B": torch.zeros(9, 3), "vera_C": torch.zeros(1)},
    ],
)
def test_projections_that_do_not_fit_are_refused(shared: dict[str, Tensor]):
    model = net()
    spec = VeRA(r=3)
    gs.attach(model, spec)
    tensors = gs.capture(model).tensors
    with pytest.raises(AdapterFileError, match="projections"):
        gs.attach(net(), gs.Adapter(spec, {**tensors, "": shared}))


def test_all_layers_hold_one_pair_which_no_state_dict_shows():
    model = net()
    gs.attach(model, VeRA(r=3))
    layers = [module for module in model.modules() if isinstance(module, VeRALayer)]
    assert len(layers) == 2
    assert layers[0].projections is layers[1].projections
    assert not [name for name in model.state_dict() if "vera_A" in name or "vera_B" in name]
    model.to(torch.bfloat16)
    assert model(x().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
@torch.no_grad()
def test_real_architectures(architecture: str):
    model, inputs = tiny(architecture), tiny_inputs(architecture)
    before = model(**inputs).logits
    report = gs.attach(model, VeRA(r=4))
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)
    sizes = [model.get_submodule(row.path).weight.shape for row in report.sites]
    outs = [size[1] if architecture == "gpt2" else size[0] for size in sizes]
    assert report.trainable == sum(outs) + 4 * len(outs)
    shaken(model, "default")
    out = model(**inputs).logits
    assert not torch.allclose(out, before, atol=1e-3)
    with gs.using(model, ["default", None]):
        rows = model(**inputs).logits
    torch.testing.assert_close(rows, torch.stack([out[0], before[1]]), rtol=1e-5, atol=1e-5)
    gs.merge(model)
    torch.testing.assert_close(model(**inputs).logits, out, rtol=1e-4, atol=1e-4)
