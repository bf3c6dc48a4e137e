"""What a forward really does decides: modules that are read and not called, and classes whose forward is their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.errors import GossamerError, StateError, UnsupportedError
from gossamer.methods import TargetedMethod
from tests.adapters import bits, same_bits, shaken, trained

Build = Callable[[], nn.Module]


def seeded(build: Build) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


# Modules that are read -----------------------------------------------------------------------------------------------


def _product(x: Tensor, module: nn.Linear) -> Tensor:
    return F.linear(x, module.weight, module.bias)


class Owner(nn.Module):
    """`read` is used without being called, in the way of the subclass; `out` is called, and asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.out, self.flag = nn.Linear(4, 4), nn.Linear(4, 4), False
        self.several = nn.ModuleList([nn.Linear(4, 4)])

    def used(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.out.bias is not None:
            x = x.to(self.out.weight.dtype)
        return self.out(torch.tanh(self.used(x)))


class Direct(Owner):
    def used(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read.weight, self.read.bias)


class Aliased(Owner):
    def used(self, x: Tensor) -> Tensor:
        other, module = 1.0, self.read
        return other * (x @ module.weight.T + module.bias)


class Handed(Owner):
    def used(self, x: Tensor) -> Tensor:
        return _product(x, module=self.read)


class ByMethod(Owner):
    def used(self, x: Tensor) -> Tensor:
        return self.through(self.read, x)

    def through(self, module: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, module.weight, module.bias)


class ByName(Owner):
    def used(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.read, "weight"), getattr(getattr(self, "read"), "bias"))  # noqa: B009


class Sometimes(Owner):
    """Called at first and read later, as hybrids do once there is a cache."""

    def used(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            return self.read(x)
        return F.linear(x, self.read.weight, self.read.bias)


class Parental(Direct):
    def used(self, x: Tensor) -> Tensor:
        return super().used(x)


_WITHOUT_SOURCE: dict[str, type[Owner]] = {"Owner": Owner, "F": F}  # pyright: ignore[reportAssignmentType]
exec(  # a class that no file holds
    "class Typed(Owner):\n    def used(self, x):\n        return F.linear(x, self.read.weight, self.read.bias)\n",
    _WITHOUT_SOURCE,
)
READERS = [Direct, Aliased, Handed, ByMethod, ByName, Sometimes, Parental, _WITHOUT_SOURCE["Typed"]]
each_reader = pytest.mark.parametrize("reader", READERS, ids=[reader.__name__ for reader in READERS])


@each_reader
def test_a_module_that_is_read_carries_no_layer(reader: type[Owner]):
    net = seeded(reader)
    with pytest.raises(UnsupportedError, match=f"{reader.__name__} uses its weight without calling it"):
        gs.attach(net, gs.LoRA(r=2, target_modules=("read",)))
    report = gs.attach(net, gs.LoRA(r=2))
    assert [site.path for site in report.sites] == ["out", "several.0"]
    assert "all-linear leaves out read" in str(report)


@each_reader
@pytest.mark.parametrize(
    "spec",
    [gs.LoRA(r=2, bias="all"), gs.LoRA(r=2, modules_to_save=("read",)), gs.BitFit(), gs.FullTuning()],
    ids=["biases", "saved", "bitfit", "full"],
)
def test_what_is_trained_whole_holds_where_it_is_read(reader: type[Owner], spec: TargetedMethod):
    net, x = seeded(reader), drawn(3, 4)
    before, start = bits(net), net(x)
    gs.attach(net, spec)
    torch.testing.assert_close(net(x), start)
    shaken(net, "default", 0.3)
    own = gs.trainable_parameters(net)
    beside = net(x)
    beside.sum().backward()
    assert all(parameter.grad is not None for name, parameter in own.items() if "read" in name)
    for name, parameter in own.items():  # the part at `read` alone does something
        parameter.data.mul_("read" in name or "lora" in name)
    torch.testing.assert_close(net(x), merged(net, x))
    gs.detach(net)
    assert same_bits(bits(net), before)
    assert not net._forward_pre_hooks
    assert not net._forward_hooks
    assert torch.equal(net(x), start)


def merged(net: nn.Module, x: Tensor) -> Tensor:
    gs.merge(net)
    found = net(x)
    gs.unmerge(net)
    return found


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.mix(self.embed(ids)), self.embed.weight)


def test_a_head_that_reads_its_embedding():
    net, ids = seeded(TiedHead), torch.tensor([[1, 2, 9]])
    with pytest.raises(UnsupportedError, match="TiedHead"):
        gs.attach(net, gs.LoRA(r=2, target_modules=("embed",)))
    trained(net, gs.LoRA(r=2, trainable_tokens={"embed": (2, 9)}))
    torch.testing.assert_close(net(ids), merged(net, ids))


class Guarded(nn.Module):
    """Reads under a flag that is off, and in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.exact, self.one, self.two = False, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.one.weight) if self.exact and x.ndim > 1 else self.one(x)
        if self.training and x.ndim > 1:
            return F.linear(x, self.two.weight, self.two.bias)
        return self.two(x)


def test_reads_that_do_not_happen():
    """A flag that is off reads nothing. What training alone reads can be named, and is left out otherwise."""
    net, x = seeded(Guarded), drawn(3, 4)
    report = gs.attach(net, gs.LoRA(r=2))
    assert [site.path for site in report.sites] == ["one"]
    assert "two: Guarded uses its weight without calling it in training" in str(report)
    gs.detach(net)
    trained(net, gs.LoRA(r=2, target_modules=("one", "two"), bias="all"))
    torch.testing.assert_close(net(x), merged(net, x))
    gs.detach(net)
    net.exact = True
    with pytest.raises(UnsupportedError, match="Guarded"):
        gs.attach(net, gs.LoRA(r=2, target_modules=("one",)))


def test_rows_cannot_differ_where_a_parameter_is_read():
    net, x = seeded(Direct), drawn(2, 4)
    trained(net, gs.BitFit(), "a")
    trained(net, gs.LoRA(r=2, target_modules=("out",)), "b")
    with gs.using(net, ["a", "a"]):
        both = net(x)
    with gs.using(net, "a"):
        torch.testing.assert_close(net(x), both)
    with gs.using(net, ["b", None]):
        net(x)
    with gs.using(net, ["a", None]), pytest.raises(StateError, match="read without calling"):
        net(x)
    assert net.read.bias.requires_grad is False
    with gs.using(net, None):
        torch.testing.assert_close(net(x), seeded(Direct)(x))


def test_a_stored_change_of_a_module_that_is_read():
    """PEFT writes factors there, which no gradient ever reached: zeros are nothing, all else is refused."""
    net = seeded(Direct)
    factors = {"lora_A": drawn(2, 4), "lora_B": torch.zeros(4, 2)}
    spec = gs.LoRA(r=2, target_modules=("read", "out"))
    tensors = {"read": factors, "out": {"lora_A": drawn(2, 4), "lora_B": drawn(4, 2)}}
    report = gs.attach(net, gs.Adapter(spec, tensors))
    assert "read carries a change of zero" in str(report)
    assert gs.capture(net).tensors["read"].keys() == factors.keys()
    gs.detach(net)
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        gs.attach(net, gs.Adapter(spec, tensors), trainable=True)
    with pytest.raises(UnsupportedError, match="when it is merged and not before"):
        gs.attach(net, gs.Adapter(spec, tensors | {"read": factors | {"lora_B": drawn(4, 2)}}))
    gs.attach(net, gs.Adapter(spec.replace(target_modules="all-linear"), tensors | {"several.0": tensors["out"]}))


@pytest.mark.parametrize("normed", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("new", [False, True], ids=["hook", "parametrisation"])
def test_weights_that_are_computed(normed: str, new: bool):
    """The old way computes the weight before the forward, so a value has to be there earlier than that."""
    wrap = getattr(nn.utils.parametrizations if new else nn.utils, normed)
    net, x = seeded(lambda: nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4))), drawn(3, 4)
    with pytest.raises(GossamerError):
        gs.attach(net, gs.LoRA(r=2, target_modules=("0",)))
    assert len(gs.attach(net, gs.LoRA(r=2)).sites) == 1
    gs.detach(net)
    start = net(x)
    gs.attach(net, gs.FullTuning())
    for name, parameter in gs.trainable_parameters(net).items():
        parameter.data.mul_(1.0 if name.startswith("1") else 1.5)
    if normed == "weight_norm":
        assert not torch.allclose(net(x), start)
    torch.testing.assert_close(net(x), merged(net, x))


# Classes with a forward of their own ---------------------------------------------------------------------------------


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(x), self.weight, self.bias)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight, self.bias)


class Scores(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = super().forward(x)
        return out, out.argmax(-1)


class Spelled(nn.Linear):
    """Its own forward, and the same map."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T + self.bias).relu() - (-(x @ self.weight.T) - self.bias).relu()


class Inherited(nn.Linear):
    """Another class, no other forward."""


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


class Padded(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 1)), weight, bias)


class Normed(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(super().forward(ids), dim=-1)


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor, past: int = 0) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(ids + past)


class Moved(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1.0


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3.0 * super().forward(ids)


WRONG: dict[str, tuple[Build, str]] = {
    "rectified": (lambda: Rectified(4, 4), "does not change its output"),
    "doubled": (lambda: Doubled(4, 4), "does not change its output"),
    "squared": (lambda: Squared(4, 4), "does not change its output"),
    "router": (lambda: Scores(4, 4), "returns a tuple"),
    "causal": (lambda: Causal(4, 4, 3), "does not change its output"),
    "padded": (lambda: Padded(4, 4, 3), "does not change its output"),
    "normed": (lambda: Normed(5, 4), "does not"),
    "shifted": (lambda: Shifted(5, 4), "more than the ids"),
    "moved": (lambda: Moved(5, 4), "does not"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_forward_that_is_another_map(name: str):
    build, why = WRONG[name]
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 4), build()))
    with pytest.raises(UnsupportedError, match=f"the forward of {type(net[1]).__name__} is its own.*{why}"):
        gs.attach(net, gs.LoRA(r=2, target_modules=("1",)))
    report = gs.attach(net, gs.LoRA(r=2))
    assert [site.path for site in report.sites] == ["0"]
    assert ("leaves out 1" in str(report)) == isinstance(net[1], nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [lambda: Spelled(4, 4), lambda: Inherited(4, 4), lambda: Scaled(5, 4)])
def test_a_forward_that_is_the_map(build: Build, dtype: torch.dtype):
    net = nn.Sequential(seeded(build)).to(dtype)
    x = torch.tensor([[0, 4]]) if isinstance(net[0], nn.Embedding) else drawn(3, 4).to(dtype)
    trained(net, gs.LoRA(r=2, target_modules=("0",)))
    near: dict[str, Any] = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(net(x), merged(net, x), **near)


def test_the_forward_of_one_module():
    """Another tool's forward on a module: one that ends in the module's own stands, another map is refused."""
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    one = net[0]
    one.forward = lambda x: F.linear(x.relu(), one.weight, one.bias)
    with pytest.raises(UnsupportedError, match="own"):
        gs.attach(net, gs.LoRA(r=2, target_modules=("0",)))
    gs.attach(net, gs.BitFit(), "biases")  # which holds whatever the forward is
    with pytest.raises(UnsupportedError, match="own"):
        gs.attach(net, gs.LoRA(r=2, target_modules=("0",)))
    gs.detach(net)
    one.forward = lambda x: F.linear(x, one.weight, one.bias)
    assert len(gs.attach(net, gs.LoRA(r=2)).sites) == 2


def test_a_trial_leaves_no_trace():
    net = seeded(lambda: nn.Sequential(Spelled(4, 4)))
    before, weight = bits(net), net[0].weight
    gs.attach(net, gs.LoRA(r=2))
    gs.detach(net)
    assert same_bits(bits(net), before)
    assert net[0].weight is weight
