"""Every kind of module: what an adapter computes beside it, by einsum and convolution of the merged weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import SharedWeightError, StateError, TargetError, UnsupportedError
from gossamer.methods import TargetedMethod
from tests.adapters import bits, same_bits, shaken, tokens, trained

Build = Callable[[], nn.Module]
METHODS = [gs.LoRA, gs.DoRA]
every_method = pytest.mark.parametrize("method", METHODS)


def seeded(build: Build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def drawn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(0))


def merged_twin(net: nn.Module) -> nn.Module:
    """A plain copy with the adapter folded in."""
    twin = copy.deepcopy(net)
    gs.merge(twin, keep=False)
    return twin


CONVOLUTIONS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 11)),
    "1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 11)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2)), (2, 4, 9, 8)),
    "2d strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 9, 8)),
    "2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 9, 8)),
    "2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2), (2, 4, 5, 6, 7)),
}


@every_method
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, method: type[TargetedMethod]):
    build, size = CONVOLUTIONS[name]
    net = nn.Sequential(seeded(build)).double()
    x = drawn(*size, dtype=torch.float64)
    before = net(x)
    gs.attach(net, method(r=2, target_modules=("0",)))
    assert torch.equal(net(x), before)
    shaken(net, "default", 0.3)
    beside = net(x)
    assert not torch.allclose(beside, before)
    torch.testing.assert_close(merged_twin(net)(x), beside, rtol=1e-6, atol=1e-6)
    beside.sum().backward()
    assert all(parameter.grad.any() for parameter in gs.trainable_parameters(net).values())


def test_a_grouped_convolution():
    """PEFT's layout: A sees all inputs, B is grouped. There is no grouped weight that says the same."""
    net = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2))
    x, before = drawn(2, 4, 9), bits(net)
    trained(net, gs.LoRA(r=4, target_modules=("0",)))
    slots = gs.capture(net).tensors["0"]
    assert (slots["lora_A"].shape, slots["lora_B"].shape) == ((4, 4, 3), (6, 2, 1))
    down = nn.functional.conv1d(x, slots["lora_A"])
    up = nn.functional.conv1d(down, slots["lora_B"], groups=2)
    torch.testing.assert_close(net(x), nn.Conv1d.forward(net[0], x) + 4 * up)
    with pytest.raises(UnsupportedError, match="groups"):
        gs.merge(net)
    assert same_bits(bits(net), before)
    with pytest.raises(TargetError, match="multiple of its groups"):
        gs.attach(net, gs.LoRA(r=3, target_modules=("0",)), "odd")


@every_method
def test_an_embedding(method: type[TargetedMethod]):
    net, ids = nn.Sequential(nn.Embedding(10, 6, padding_idx=3)), torch.tensor([[0, 3, 9], [4, 4, 1]])
    before = net(ids)
    gs.attach(net, method(r=2, target_modules=("0",)))
    assert torch.equal(net(ids), before)
    shaken(net, "default", 0.3)
    beside = net(ids)
    torch.testing.assert_close(merged_twin(net)(ids), beside)
    table = net[0].weight + (gs.capture(net).delta("0").T if method is gs.LoRA else 0)
    if method is gs.LoRA:
        torch.testing.assert_close(beside, table[ids])


def test_an_embedding_with_max_norm():
    """The frozen rows are shrunk when they are looked up, the low-rank term is not, and its factors never are."""
    net, ids = nn.Sequential(nn.Embedding(10, 6, max_norm=1.0)), torch.tensor([[0, 3, 9]])
    rows = net(ids)
    adapter = trained(net, gs.LoRA(r=2, target_modules=("0",)))
    torch.testing.assert_close(net(ids), rows + adapter.delta("0").T[ids])
    assert gs.capture(net) == adapter
    before = bits(net)
    with pytest.raises(UnsupportedError, match="max_norm"):
        gs.merge(net)
    assert same_bits(bits(net), before)


def test_a_scaled_embedding(toy: Callable[[str], nn.Module]):
    """Gemma multiplies its embedding by a constant; the adapter's part is multiplied too."""
    model, ids = toy("gemma"), tokens()
    embed = model.get_input_embeddings()
    before = embed(ids)
    scale = (before / embed.weight[ids]).mean().item()
    adapter = trained(model, gs.LoRA(r=2, target_modules=("embed_tokens",)))
    torch.testing.assert_close(embed(ids), before + scale * adapter.delta("model.embed_tokens").T[ids])
    with pytest.raises(SharedWeightError):
        gs.merge(model)  # tied to the head


def test_tied_embedding_and_head_keep_apart(toy: Callable[[str], nn.Module]):
    model = toy("gpt2")
    base = model(tokens()).logits
    trained(model, gs.LoRA(r=2, target_modules=("wte",)))
    hidden = model.transformer(tokens()).last_hidden_state
    torch.testing.assert_close(model(tokens()).logits, hidden @ model.lm_head.weight.T)
    assert not torch.allclose(model(tokens()).logits, base)


# Experts -------------------------------------------------------------------------------------------------------------


class ToyExperts(nn.Module):
    """Stacked experts as transformers 5 lays them out, each row of the input through one of them."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        size = (3, 5, 8) if transposed else (3, 8, 5)
        self.gate_up_proj = nn.Parameter(torch.randn(size))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 5) if transposed else torch.randn(3, 5, 4))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        up, down = self.gate_up_proj[chosen], self.down_proj[chosen]
        up, down = (up.mT, down.mT) if self.is_transposed else (up, down)
        gate, inner = (up @ x[..., None]).squeeze(-1).chunk(2, dim=-1)
        return (down @ (gate.tanh() * inner)[..., None]).squeeze(-1)


class Routed(nn.Module):
    """(B, T, D) flattened to tokens, as routers do."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.experts = ToyExperts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(x.shape[0] * x.shape[1]) % 3
        return self.experts(x.flatten(0, 1), chosen).view_as(x)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed: bool):
    net = seeded(lambda: Routed(transposed))
    x = drawn(2, 3, 5)
    before = net(x)
    report = gs.attach(net, gs.LoRA(r=2, alpha=6.0, target_modules=(), target_parameters=("gate_up_proj", "down_proj")))
    assert report.trainable == 3 * 2 * (5 + 8) + 3 * 2 * (4 + 5)
    assert torch.equal(net(x), before)
    shaken(net, "default", 0.3)
    adapter, twin = gs.capture(net), seeded(lambda: Routed(transposed))
    for name in ("gate_up_proj", "down_proj"):
        inner, outer = (adapter.tensors["experts"][f"{name}.lora_{part}"] for part in "AB")
        for expert in range(3):
            change = 3.0 * outer.reshape(outer.shape[0], 2, 3)[:, :, expert] @ inner.reshape(3, 2, -1)[expert]
            getattr(twin.experts, name).data[expert] += change.T if transposed else change
    torch.testing.assert_close(net(x), twin(x))
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in gs.trainable_parameters(net).values())
    torch.testing.assert_close(merged_twin(net)(x), net(x))


def test_experts_of_two_adapters_and_of_rows():
    net = seeded(Routed)
    x = drawn(3, 4, 5)
    trained(net, gs.LoRA(r=2, target_modules=("experts",)), "a", 1)
    trained(net, gs.LoRA(r=1, target_modules=(), target_parameters=("experts.down_proj",)), "b", 2)
    with gs.using(net, "a", "b"):
        both = net(x)
        gs.merge(net)
        torch.testing.assert_close(net(x), both)
        gs.unmerge(net)
    alone = {}
    for name in ("a", "b", None):
        with gs.using(net, name):
            alone[name] = net(x)
    assert not torch.allclose(both, alone["a"])
    # the chosen expert depends on the place, so each row is compared in its own place
    with gs.using(net, ["b", None, "a"]):
        mixed = net(x)
    for row, name in enumerate(("b", None, "a")):
        torch.testing.assert_close(mixed[row], alone[name][row])


def test_names_from_before_experts_were_stacked():
    net = seeded(Routed)
    gs.attach(net, gs.LoRA(r=2, target_modules=("w1", "w3")))
    assert {*gs.capture(net).tensors["experts"]} == {"gate_up_proj.lora_A", "gate_up_proj.lora_B"}
    with pytest.raises(TargetError, match="w5"):
        gs.attach(net, gs.LoRA(r=2, target_modules=("w1", "w5")), "other")


# torch's attention ---------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.attention.kdim]
        return self.attention(x, other, other)[0]


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6}], ids=["one projection", "three"])
@pytest.mark.parametrize("targets", ["all-linear", ("attention",)])
def test_multihead_attention(options: dict[str, int], targets: str | tuple[str, ...]):
    net = seeded(lambda: Attending(**options))
    x, before = drawn(2, 3, 8), bits(net)
    start = net(x)
    gs.attach(net, gs.LoRA(r=2, target_modules=targets))
    assert torch.equal(net(x), start)
    shaken(net, "default", 0.3)
    with torch.no_grad():
        beside = net(x)
    assert not torch.allclose(beside, start)
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in gs.trainable_parameters(net).values())
    torch.testing.assert_close(merged_twin(net)(x), beside, rtol=1e-5, atol=1e-5)
    trained(net, gs.LoRA(r=1, target_modules=targets), "b", 3)
    with gs.using(net, "b"):
        other = net(x)
    with gs.using(net, ["default", "b"]):
        torch.testing.assert_close(net(x), torch.stack([beside[0], other[1]]))
    gs.detach(net)
    assert same_bits(bits(net), before)


def test_a_part_of_attention_is_not_a_module_of_its_own():
    with pytest.raises(UnsupportedError, match="adapt the attention itself"):
        gs.attach(seeded(Attending), gs.LoRA(target_modules=("out_proj",)))


def test_attention_trained_whole():
    """Its `out_proj` is a module of its own that is never called: the attention's layer trains that too."""
    net, x = nn.ModuleDict({"attend": seeded(Attending), "out": nn.Linear(8, 8)}), drawn(2, 3, 8)
    net.forward = lambda x: net["out"](net["attend"](x))  # pyright: ignore[reportAttributeAccessIssue]
    gs.attach(net, gs.LoRA(r=2, target_modules=("out",), modules_to_save=("attention",)))
    shaken(net, "default", 0.3)
    beside = net(x)
    beside.sum().backward()
    assert all(parameter.grad is not None for parameter in gs.trainable_parameters(net).values())
    assert "out_proj.weight" in gs.capture(net).tensors["attend.attention"]
    gs.merge(net)
    torch.testing.assert_close(net(x), beside, rtol=1e-5, atol=1e-5)


def test_recurrent_modules_are_refused_by_name():
    net = nn.ModuleDict({"memory": nn.LSTM(4, 4), "out": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedError, match="flat copy"):
        gs.attach(net, gs.LoRA(target_modules=("out",), modules_to_save=("memory",)))


def test_rows_need_the_batch_first():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    net = Turned()
    trained(net, gs.LoRA(r=2))
    with gs.using(net, ["default", None]), pytest.raises(StateError, match="batch_first"):
        net(drawn(2, 2, 8))


def test_a_torch_encoder_layer():
    """In evaluation it reads the weights of its parts without calling them; a part with a hook makes it call."""
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)).eval()
    x = drawn(2, 3, 8)
    with torch.no_grad():
        before, found = bits(net), net(x)
        assert len(gs.attach(net, gs.LoRA(r=2)).sites) == 3
        torch.testing.assert_close(net(x), found)
        shaken(net, "default", 0.3)
        beside = net(x)
        assert not torch.allclose(beside, found, atol=1e-3)
        gs.merge(net)
        torch.testing.assert_close(net(x), beside, rtol=1e-4, atol=1e-5)
        gs.detach(net)
        assert same_bits(bits(net), before)
        assert torch.equal(net(x), found)
    assert not any(module._forward_pre_hooks for module in net.modules())


# Trained rows of an embedding ----------------------------------------------------------------------------------------


def resized(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(330, mean_resizing=False)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_new_tokens(name: str, toy: Callable[[str], nn.Module]):
    """After a resize only the new rows are trained and stored; a tied head uses the same rows."""
    model = resized(toy(name))
    ids = torch.tensor([[5, 321, 7], [325, 9, 9]])
    before, start = bits(model), model(ids).logits
    gs.attach(model, gs.LoRA(r=2, trainable_tokens=(321, 325)))
    torch.testing.assert_close(model(ids).logits, start)
    shaken(model, "default", 0.3)
    adapter, beside = gs.capture(model), model(ids).logits
    (path,) = (path for path, slots in adapter.tensors.items() if "trainable_tokens_delta" in slots)
    rows = adapter.tensors[path]["trainable_tokens_delta"]
    assert rows.shape == (2, 64)
    twin = resized(toy(name))
    twin.load_state_dict(before)
    twin.get_input_embeddings().weight.data[[321, 325]] = rows
    only = {path: slots for path, slots in adapter.tensors.items() if "trainable_tokens_delta" not in slots}
    gs.attach(twin, gs.Adapter(adapter.spec.replace(trainable_tokens=()), only))
    torch.testing.assert_close(beside, twin(ids).logits)
    model(ids).logits.sum().backward()
    gs.merge(model)
    torch.testing.assert_close(model(ids).logits, beside, rtol=1e-4, atol=1e-3)
    gs.unmerge(model)
    again = gs.capture(model)
    assert again == adapter
    gs.detach(model)
    assert same_bits(bits(model), before)


def test_rows_of_the_batch_with_and_without_new_tokens(toy: Callable[[str], nn.Module]):
    model, ids = toy("gpt2"), tokens(2)
    ids[:, 3] = 7
    trained(model, gs.LoRA(r=2, trainable_tokens=(7, 9)), "a")
    alone = {}
    for name in ("a", None):
        with gs.using(model, name):
            alone[name] = model(ids).logits
    with gs.using(model, ["a", None]):
        torch.testing.assert_close(
            model(ids).logits, torch.stack([alone["a"][0], alone[None][1]]), atol=1e-5, rtol=1e-4
        )
