"""DoRA against its own equation in float64: forward, gradients, norms without the sum, merge, every kind of module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.kernels import fused
from tests.adapters import shaken


def dense(net: nn.Module, path: str, adapter: gs.Adapter) -> tuple[Tensor, Tensor]:
    """m / ||W + D|| (W + D), and the norm, by the book: the (out, in) sum is formed, in float64."""
    slots = {name: tensor.double() for name, tensor in adapter.tensors[path].items()}
    weight = net.get_submodule(path).weight.detach().double()
    change = adapter.spec.scaling_at(path) * slots["lora_B"] @ slots["lora_A"]
    norm = (weight + change).norm(dim=1, keepdim=True)
    return slots["lora_magnitude_vector"][:, None] * (weight + change) / norm, norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(5,), (2, 3), ()])
def test_the_equation(bias: bool, rows: tuple[int, ...]):
    net = nn.Sequential(nn.Linear(7, 6, bias=bias)).double()
    gs.attach(net, gs.DoRA(r=3, alpha=5.0))
    shaken(net, "default", 0.5)
    weight, _ = dense(net, "0", gs.capture(net))
    x = torch.randn(*rows, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(x, weight, net[0].bias)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    gs.merge(net)  # of float32 factors
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_equation_with_a_constant_norm():
    net = nn.Sequential(nn.Linear(7, 6)).double()
    gs.attach(net, gs.DoRA(r=3, alpha=5.0))
    shaken(net, "default", 0.5)
    _, norm = dense(net, "0", gs.capture(net))
    own = gs.trainable_parameters(net, "default")
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    net(x).square().sum().backward()
    found = {name: parameter.grad.double() for name, parameter in own.items() if parameter.grad is not None}
    found["x"] = x.grad  # pyright: ignore[reportArgumentType]
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in own.items()}
    again = x.detach().clone().requires_grad_()
    change = 5 / 3 * leaves["0.lora_B"] @ leaves["0.lora_A"]
    weight = leaves["0.lora_magnitude_vector"][:, None] * (net[0].weight.detach() + change) / norm
    nn.functional.linear(again, weight, net[0].bias).square().sum().backward()
    leaves["x"] = again
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_fused_kernel_equals_its_plain_twin(with_bias: bool):
    def inputs() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = ((3, 4, 6), (3, 4, 2), (6, 2), (6,))
        return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in sizes]

    bias = torch.randn(6, dtype=torch.float64) if with_bias else None
    one, other = inputs(), inputs()
    out, down, factor, ratio = one
    fast = fused.dora(out, down, factor, ratio, bias, 0.7)
    out, down, factor, ratio = other
    plain = fused.plain_dora(out, 0.7 * down @ factor.T, ratio, bias)
    torch.testing.assert_close(fast, plain)
    for result in (fast, plain):
        result.square().sum().backward()
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_changed_base_weight_is_noticed():
    """||W||^2 is kept; loading other weights into the base must not leave an old one."""
    net, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(3, 5)
    gs.attach(net, gs.DoRA(r=2))
    shaken(net, "default", 0.3)
    net(x)
    twin = nn.Sequential(nn.Linear(5, 4))
    twin.load_state_dict({"0.weight": 3 * net[0].weight.detach(), "0.bias": net[0].bias.detach()})
    net.load_state_dict(twin.state_dict(), strict=False)
    gs.attach(twin, gs.capture(net), force_base=True)
    torch.testing.assert_close(net(x), twin(x))


def test_the_parameters_are_counted():
    net = nn.Sequential(nn.Linear(7, 6))
    assert gs.attach(net, gs.DoRA(r=3)).trainable == 3 * (7 + 6) + 6


@pytest.mark.parametrize("start", ["pissa", "pissa_fast", "olora"])
def test_a_start_made_of_the_weight_changes_nothing(start: str):
    net, x = nn.Sequential(nn.Linear(9, 8)), torch.randn(3, 9)
    before = net(x)
    gs.attach(net, gs.DoRA(r=2, start=start))  # pyright: ignore[reportArgumentType]
    assert torch.equal(net(x), before)
    shaken(net, "default", 0.2)
    beside = net(x)
    assert not torch.allclose(beside, before)
    gs.merge(net)
    torch.testing.assert_close(net(x), beside, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_starts_unchanged_and_stays_finite():
    net, x = nn.Sequential(nn.Linear(7, 6)), torch.randn(3, 7)
    net[0].weight.data[2] = 0
    before = net(x)
    gs.attach(net, gs.DoRA(r=3))
    assert torch.equal(net(x), before)
    net(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in gs.trainable_parameters(net, "default").values())
    shaken(net, "default")
    beside = net(x)
    assert beside.isfinite().all()
    gs.merge(net)
    torch.testing.assert_close(net(x), beside, rtol=1e-5, atol=1e-5)
