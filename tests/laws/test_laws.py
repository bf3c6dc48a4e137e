"""The laws of docs/house.md: properties that every registered method inherits by being registered."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gossamer as gs
from gossamer.errors import UnsupportedError
from gossamer.methods import METHODS
from tests.adapters import bits, same_bits, shaken, trained
from tests.laws.folding import merged_or_refused
from tests.laws.nets import Case, TowerCase, cases
from tests.laws.specs import ADDABLE, LOOSER, MOVE_AT_THE_START, SPECS

law = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
every_method = pytest.mark.parametrize("method", METHODS)
every_addable_method = pytest.mark.parametrize("method", ADDABLE)


def close(one: torch.Tensor, other: torch.Tensor, case: Case, method: str) -> None:
    tolerance = case.tolerance * LOOSER.get(method, 1.0)
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_every_registered_method_can_be_drawn():
    assert SPECS.keys() == METHODS.keys()


@every_method
@law
@given(data=st.data())
def test_at_the_start_the_output_is_unchanged(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = case.net(), case.x()
    before = net(x)
    gs.attach(net, data.draw(SPECS[method]))
    assert torch.equal(net(x), before) == (method not in MOVE_AT_THE_START)


@every_method
@law
@given(data=st.data())
def test_only_its_parameters_get_gradients_and_all_of_them(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = case.net(), case.x()
    gs.attach(net, data.draw(SPECS[method]))
    shaken(net, "default")
    net(x).square().sum().backward()
    own = {id(parameter) for parameter in gs.trainable_parameters(net, "default").values()}
    for parameter in net.parameters():
        assert (parameter.grad is not None) == (id(parameter) in own)


@every_method
@law
@given(data=st.data())
def test_merged_equals_unmerged_and_unmerge_gives_the_bits_back(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = case.net(), case.x()
    trained(net, data.draw(SPECS[method]))
    before, beside = bits(net), net(x)
    for _ in range(10):
        if merged_or_refused(net, method):
            close(net(x), beside, case, method)
            assert not same_bits(bits(net), before)
            gs.unmerge(net)
        assert same_bits(bits(net), before)
    assert torch.equal(net(x), beside)


@every_method
@law
@given(data=st.data())
def test_detach_leaves_the_model_as_it_was_found(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = case.net(), case.x()
    next(net.parameters()).requires_grad_(False)
    before, out = bits(net), net(x)
    attributes = {path: {*vars(module)} | {*module._modules} for path, module in net.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    trained(net, data.draw(SPECS[method]))
    if data.draw(st.booleans()):
        merged_or_refused(net, method)
    gs.detach(net)
    assert same_bits(bits(net), before)
    assert torch.equal(net(x), out)
    assert {path: {*vars(module)} | {*module._modules} for path, module in net.named_modules()} == attributes
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == flags


@every_method
@law
@given(data=st.data())
def test_names_hold_no_wrapper_and_do_not_depend_on_order(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    one, other = case.net(), case.net()
    first, second = data.draw(SPECS[method]), data.draw(SPECS[method])
    base_names = [*one.state_dict()]
    gs.attach(one, first, "first")
    gs.attach(one, second, "second")
    gs.attach(other, second, "second")
    gs.attach(other, first, "first")
    for name in ("first", "second"):
        assert gs.capture(one, name) == gs.capture(other, name)
    modules = {path for path, _ in case.net().named_modules()}
    assert set(gs.capture(one, "first").paths) <= modules
    assert [name for name in one.state_dict() if "gossamer" not in name.split(".")] == base_names
    gs.use(one, "first")
    gs.use(other, "first")
    assert torch.equal(one(case.x()), other(case.x()))


@every_method
@law
@given(data=st.data())
def test_saving_and_loading_is_bit_exact(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net = case.net()
    adapter = trained(net, data.draw(SPECS[method]))
    with tempfile.TemporaryDirectory() as folder:
        loaded = gs.Adapter.load(adapter.save(Path(folder) / "adapter"))
    assert loaded == adapter
    assert loaded.spec == adapter.spec
    assert loaded.base == adapter.base
    assert same_bits(dict(loaded.named_tensors()), dict(adapter.named_tensors()))
    again = case.net()
    gs.attach(again, loaded)
    assert torch.equal(again(case.x()), net(case.x()))
    assert gs.capture(again) == adapter


@every_method
@law
@given(data=st.data())
def test_a_row_of_a_mixed_batch_equals_that_row_alone(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = case.net(), case.x(rows=4)
    for name, seed in (("a", 1), ("b", 2)):
        trained(net, data.draw(SPECS[method]), name, seed)
    chosen = data.draw(st.lists(st.sampled_from(["a", "b", None]), min_size=4, max_size=4))
    with gs.using(net, chosen):
        mixed = net(x)
    for row, name in enumerate(chosen):
        with gs.using(net, name):
            close(mixed[row], net(x[row : row + 1])[0], case, method)


@every_method
@law
@given(data=st.data())
def test_a_refused_merge_changes_nothing(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net, x = case.net(), case.x()
    trained(net, data.draw(SPECS[method]))
    name, broken = next(reversed(gs.trainable_parameters(net, "default").items()))
    broken.data.view(-1)[0] = float("inf")
    before = bits(net)
    with pytest.raises(gs.GossamerError):
        gs.merge(net)
    assert same_bits(bits(net), before), name
    with gs.using(net, None):
        net(x)  # still adapted, still switchable


@every_addable_method
@law
@given(data=st.data())
def test_adapters_are_a_vector_space(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    net = case.net()
    a = trained(net, data.draw(ADDABLE[method]), "a", 1)
    b = trained(net, data.draw(ADDABLE[method]), "b", 2)
    w = data.draw(st.floats(-3, 3, width=32).filter(lambda value: abs(value) > 1e-3))

    def exact(adapter: gs.Adapter, path: str) -> torch.Tensor:
        slots = {name: tensor.double() for name, tensor in adapter.tensors[path].items()}
        return adapter.spec.delta(path, slots)

    assert 1 * a == a
    for path in a.paths:
        for found, expected in (
            (a + b, exact(a, path) + exact(b, path)),
            (w * a, w * exact(a, path)),
            (a - b, exact(a, path) - exact(b, path)),
            (-a, -exact(a, path)),
        ):
            size = max(exact(a, path).norm().item(), exact(b, path).norm().item())
            assert (found.delta(path).double() - expected).norm() <= 1e-6 * max(size, expected.norm().item())
        assert (a - a).delta(path).norm() <= 1e-6 * exact(a, path).norm()
    gs.attach(net, a + b, "sum")
    with gs.using(net, "sum"):
        summed = net(case.x())
    fresh = case.net()
    gs.attach(fresh, a, "a")
    gs.attach(fresh, b, "b")
    with gs.using(fresh, "a", "b"):
        close(summed, fresh(case.x()), case, method)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ADDABLE])
@settings(law, max_examples=3)
@given(data=st.data())
def test_adapters_without_sums_say_so(method: str, data: st.DataObject):
    case = data.draw(cases(method))
    adapter = trained(case.net(), data.draw(SPECS[method]))
    assert 1 * adapter == adapter
    for operation in (lambda: adapter + adapter, lambda: 2 * adapter, lambda: -adapter):
        with pytest.raises(UnsupportedError):
            operation()


@every_addable_method
def test_what_was_trained_whole_has_no_sum(method: str):
    net = TowerCase((4, 5, 6), (True, True), (False, False), 0, torch.float32, 0).net()
    adapter = trained(net, METHODS[method](modules_to_save=("norm",)))
    for operation in (lambda: adapter + adapter, lambda: 2 * adapter, lambda: -adapter):
        with pytest.raises(UnsupportedError, match="without the base"):
            operation()
