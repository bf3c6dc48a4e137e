"""More laws: a start is exact in double precision, step two reaches every parameter, dropout and rows stay apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gossamer as gs
from gossamer.methods import METHODS
from tests.adapters import bits, same_bits, shaken, trained
from tests.laws.folding import anywhere, merged_or_refused
from tests.laws.nets import cases
from tests.laws.specs import MOVE_AT_THE_START, ROOTED, SPECS

law = settings(max_examples=25)
every_method = pytest.mark.parametrize("method", METHODS)
every_method_of_modules = pytest.mark.parametrize("method", [name for name in METHODS if name not in ROOTED])


@every_method
@law
@given(data=st.data())
def test_numbers_that_float32_does_not_hold_stay_as_they_are(method: str, data: st.DataObject):
    """Whole parameters are trained as copies; a copy of a double must not lose its last digits."""
    case = data.draw(cases(method))
    net = case.net().double()
    generator = torch.Generator().manual_seed(case.seed)
    for parameter in net.parameters():
        parameter.data *= 1 + 1e-9 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    x, before = case.x(), bits(net)
    x = x.double() if x.is_floating_point() else x
    out = net(x)
    gs.attach(net, data.draw(SPECS[method]))
    assert torch.equal(net(x), out) == (method not in MOVE_AT_THE_START)
    merged_or_refused(net, method)
    assert same_bits(bits(net), before), "an untrained adapter changes no bit"


@every_method
@law
@given(data=st.data())
def test_by_the_second_step_every_parameter_has_moved(method: str, data: st.DataObject):
    """On the first step B is zero, so A's gradient is too; from the second on nothing may be left out."""
    case = data.draw(cases(method))
    net, x = case.net(), case.x()
    before = bits(net)
    gs.attach(net, data.draw(SPECS[method]))
    own = gs.trainable_parameters(net, "default")
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimiser = torch.optim.SGD(own.values(), lr=1e-2)
    target = torch.linspace(-1, 1, net(x).numel(), dtype=torch.float64).view_as(net(x))
    for _ in range(2):
        optimiser.zero_grad()
        (net(x).double() - target).square().sum().backward()
        assert all(parameter.grad is not None for parameter in own.values())
        assert all(
            parameter.grad is None for name, parameter in net.named_parameters() if "gossamer" not in name.split(".")
        )
        optimiser.step()
    unmoved = {name: parameter for name, parameter in own.items() if torch.equal(parameter, start[name])}
    still = [name for name, one in unmoved.items() if one.grad is None or not one.grad.any()]  # not just a tiny step
    assert not still or case.dtype == torch.bfloat16, still
    assert same_bits(bits(net), before), "the base has not moved"


@every_method
@law
@given(data=st.data())
def test_dropout_acts_in_training_only_and_not_on_what_is_merged(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    spec = data.draw(SPECS[method])
    if "dropout" not in type(spec).model_fields:
        return
    net, twin, x = case.net(), case.net(), case.x()
    adapter = trained(net, spec)
    gs.attach(twin, gs.Adapter(spec.replace(dropout=0.5), adapter.tensors))
    assert torch.equal(twin(x), net(x)), "not in evaluation"
    merged_or_refused(net, method)
    merged_or_refused(twin, method)
    assert same_bits(bits(net), bits(twin))


@every_method
@law
@given(data=st.data())
def test_gradients_of_a_row_reach_only_its_adapter(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = case.net(), case.x(rows=2)
    for name in ("a", "b"):
        gs.attach(net, data.draw(SPECS[method]), name)
        shaken(net, name)
    with gs.using(net, ["a", None]):
        net(x).square().sum().backward()
    assert any(parameter.grad is not None for parameter in gs.trainable_parameters(net, "a").values())
    assert all(parameter.grad is None for parameter in gs.trainable_parameters(net, "b").values())


class Flattening(nn.Module):
    """Hands its linear module (B * T, D) instead of (B, T, D), as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x.flatten(0, 1))).view_as(x)


@every_method_of_modules
def test_rows_that_cannot_be_told_apart_are_refused(method: str):
    net, x = Flattening(), torch.randn(2, 3, 4)
    gs.attach(net, anywhere(method), "a")
    with gs.using(net, ["a", None]), pytest.raises(gs.GossamerError, match="row"):
        net(x)


@every_method_of_modules
def test_rows_of_a_module_called_by_keyword(method: str):
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.fc(input=x))

    net, x = Called(), torch.randn(2, 3, 4)
    gs.attach(net, anywhere(method), "a")
    shaken(net, "a")
    with gs.using(net, "a"):
        a = net(x)
    with gs.using(net, None):
        base = net(x)
    assert not torch.allclose(a, base)
    with gs.using(net, ["a", None]):
        torch.testing.assert_close(net(x), torch.stack([a[0], base[1]]))
