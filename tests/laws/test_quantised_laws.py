"""On a quantised base every method is what it is on the base that the codes stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gossamer as gs
from gossamer.quant import FORMATS, QuantizedLinear, quantize_model
from tests.adapters import bits, same_bits, shaken, trained
from tests.laws.folding import merged_or_refused
from tests.laws.nets import Case, TowerCase, cases
from tests.laws.specs import REFUSE_TO_MERGE, SPECS
from tests.laws.test_laws import close, every_method, law

formats = st.sampled_from([*FORMATS])


def pair(case: Case, quant: str) -> tuple[nn.Module, nn.Module]:
    """A quantised net, and the plain one that holds the numbers its codes stand for."""
    net, twin = quantize_model(case.net(), quant), case.net()
    packed = {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed
    for name, module in packed.items():
        weight = twin.get_submodule(name).get_parameter("weight")
        weight.data.copy_(module.weight if isinstance(twin.get_submodule(name), nn.Linear) else module.weight.T)
    return net, twin


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the adapter's parameters, for a loss that reaches them all."""
    net.zero_grad()
    net(x).square().sum().backward()
    return {name: value.grad.clone() for name, value in gs.trainable_parameters(net, "default").items()}


@every_method
@law
@given(data=st.data())
def test_it_starts_runs_and_learns_as_on_the_dequantised_twin(method: str, data: st.DataObject):
    case, spec = data.draw(cases(method)), data.draw(SPECS[method])
    if method == "full" and isinstance(case, TowerCase):  # a quantised Conv1D is a linear module: (out, in)
        case = replace(case, conv=(False,) * len(case.conv))
    net, twin = pair(case, data.draw(formats))
    x = case.x()
    close(net(x), twin(x), case, method)
    for one in (net, twin):
        gs.attach(one, spec)
    close(net(x), twin(x), case, method)
    started, expected = (dict(gs.capture(one).named_tensors()) for one in (net, twin))
    torch.testing.assert_close(started, expected, rtol=1e-5, atol=1e-5)
    gs.detach(twin)
    shaken(net, "default")
    gs.attach(twin, gs.capture(net), trainable=True, force_base=True)
    close(net(x), twin(x), case, method)
    ours, theirs = gradients(net, x), gradients(twin, x)
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max().item() + 1e-6
        close(ours[name] / scale, theirs[name] / scale, case, method)


@every_method
@law
@given(data=st.data())
def test_merging_equals_running_beside_and_unmerging_gives_the_codes_back(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = quantize_model(case.net(), data.draw(formats)), case.x()
    trained(net, data.draw(SPECS[method]))
    before, beside = bits(net), net(x)
    for _ in range(2):
        if merged_or_refused(net, method):
            close(net(x), beside, case, method)
            assert not same_bits(bits(net), before)
            gs.unmerge(net)
        assert same_bits(bits(net), before)
        assert torch.equal(net(x), beside)
    gs.detach(net)
    assert same_bits(bits(net), before)


@every_method
@law
@given(data=st.data())
def test_folding_for_good_leaves_a_plain_weight(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = quantize_model(case.net(), data.draw(formats)), case.x()
    adapter = trained(net, data.draw(SPECS[method]))
    if method in REFUSE_TO_MERGE:
        return
    beside, stored = net(x), {path: net.get_submodule(path) for path in adapter.paths if path}
    gs.merge(net, keep=False)
    close(net(x), beside, case, method)
    assert gs.attached(net) == ()
    for path, module in stored.items():
        if isinstance(module, QuantizedLinear) and module._parameters["weight"] is not None:
            assert {name for name in net.state_dict() if name.startswith(f"{path}.")} <= {
                f"{path}.weight",
                f"{path}.bias",
            }


@pytest.mark.parametrize("quant", FORMATS)
def test_a_quantised_copy_is_the_same_base(quant: str):
    net = TowerCase((4, 5, 6), (True, True), (False, True), 1, torch.float32, 0).net()
    before = gs.base_fingerprint(net)
    assert gs.base_fingerprint(quantize_model(net, quant)) == before
